"""A mixture layer: route, sort the token-expert pairs by expert, apply the experts, un-permute and sum the answers.

    token   0  1  2  3          K = 2 choices each, N = T x K pairs
            │╲ │╲ │╲ │╲
    sorted  e0 e0 e0 │ e1 │ e2 e2 │ e3 e3      each expert gets one run of rows
            └──── experts ────┘
    token   weighted sum of its K answers

No token is dropped and no expert is padded, however uneven the load.
"""

from torch import Tensor, nn

from khanhllm.model.router import Choice, Router, Routing, count


class MoE(nn.Module):
    """A router and its experts, in place of a dense feed-forward."""

    def __init__(self, router: Router, experts: nn.Module) -> None:
        super().__init__()
        self.router = router
        self.experts = experts

    def forward(
        self, x_BTD: Tensor, closed_BE: Tensor | None = None, padding_BT: Tensor | None = None
    ) -> tuple[Tensor, tuple[Routing]]:
        x_TD = x_BTD.flatten(0, 1)
        closed_TE = None if closed_BE is None else closed_BE.repeat_interleave(x_BTD.shape[1], 0)
        if padding_BT is None:
            choice, routing = self.router(x_TD, closed_TE)
            load_E = routing.load_E
        else:  # the experts also get what does not count
            choice, routing = self.router(x_TD, closed_TE, padding_BT.flatten())
            load_E = count(choice.expert_TK, len(routing.load_E))
        y_TD = self.answer(x_TD, choice, load_E)
        return y_TD.view_as(x_BTD), (routing,)

    def answer(self, x_TD: Tensor, choice: Choice, load_E: Tensor) -> Tensor:
        """The weighted answers of the chosen experts. Separate from `forward`, so that activation checkpointing can
        recompute this part without running the router again."""
        return self.experts(x_TD, choice, load_E)  # type: ignore[no-any-return]

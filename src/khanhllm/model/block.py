"""One layer. Its constructor takes the parts, so `forward` has no case for each kind of layer."""

from torch import Tensor, nn

from khanhllm.model.attention import Attention
from khanhllm.model.cache import LayerCache
from khanhllm.model.router import Routing


class Block(nn.Module):
    """x + attention(norm(x)), then x + feedforward(norm(x))."""

    def __init__(self, attention: Attention, feedforward: nn.Module, norms: tuple[nn.Module, nn.Module]) -> None:
        super().__init__()
        self.attention_norm, self.feedforward_norm = norms
        self.attention = attention
        self.feedforward = feedforward

    def forward(
        self,
        x_BTD: Tensor,
        past: LayerCache | None = None,
        own_BTS: Tensor | None = None,
        mask_BHTS: Tensor | None = None,
        closed_BE: Tensor | None = None,
        padding_BT: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """mask_BHTS: see `Attention`. For a mixture layer, closed_BE: the experts that each row must do without;
        padding_BT: see `Router`."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), past, own_BTS, mask_BHTS)
        y_BTD, routings = self.feedforward(self.feedforward_norm(x_BTD), closed_BE, padding_BT)
        return x_BTD + y_BTD, routings

"""Change what a mixture layer does, for the length of a `with`, and measure what the change costs.

Nothing of the model is touched: a hook hands the router another argument, or the layer another answer of the router,
and is gone at the end. What a change costs is measured on the same windows with and without it. The two differ by far
less than windows differ from each other, so even a small sample tells a small cost.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from khanhllm.data.batches import batch_of
from khanhllm.data.counting import Reading
from khanhllm.inference.likelihood import ROWS_OF_TOKENS
from khanhllm.machine.devices import Machine
from khanhllm.model import Transformer
from khanhllm.model.router import Choice, Router, Routing, count

Change = Callable[[Router], Any]
"""registers a hook and returns its handle"""


class Cost(NamedTuple):
    """What a change costs, as a share of the bits that the text takes without it, and its standard error."""

    share: float
    error: float

    @property
    def told_apart(self) -> bool:
        """Whether it can be told apart from nothing."""
        return abs(self.share) > 2 * self.error


def router_of(model: Transformer, layer: int) -> Router:
    router: Router = model.blocks[layer].feedforward.router  # type: ignore[union-attr, assignment]
    return router


@contextmanager
def changed(model: Transformer, layer: int, change: Change) -> Iterator[None]:
    """Within this context the mixture of a layer works as changed."""
    handle = change(router_of(model, layer))
    try:
        yield
    finally:
        handle.remove()


def close(*experts: int) -> Change:
    """Close experts: their tokens go to the next best, as if they had never been there (Lu et al. 2024,
    arXiv 2402.14800)."""

    def register(router: Router) -> Any:
        closed_TE = torch.zeros(1, len(router.weight), dtype=torch.bool, device=router.weight.device)
        closed_TE[:, list(experts)] = True
        return router.register_forward_pre_hook(lambda _router, inputs: (inputs[0], closed_TE, *inputs[2:]))

    return register


def _answered(rule: Callable[[Choice, int], Choice]) -> Change:
    """A change of the router's answer; `rule` gets it and the number of experts."""

    def hook(router: Router, _inputs: Any, output: tuple[Choice, Routing]) -> tuple[Choice, Routing]:
        choice, experts = rule(output[0], len(router.weight)), len(router.weight)
        return choice, output[1]._replace(load_E=count(choice.expert_TK, experts))

    return lambda router: router.register_forward_hook(hook)


def remove(*experts: int) -> Change:
    """Take away what some experts answer, and put nothing in its place."""

    def rule(choice: Choice, _experts: int) -> Choice:
        gone_TK = torch.isin(choice.expert_TK, torch.tensor(experts, device=choice.expert_TK.device))
        return choice._replace(weight_TK=choice.weight_TK.masked_fill(gone_TK, 0))

    return _answered(rule)


def off() -> Change:
    """The whole mixture answers nothing."""
    return _answered(lambda choice, _experts: choice._replace(weight_TK=torch.zeros_like(choice.weight_TK)))


def at_random(seed: int = 0) -> Change:
    """Dice choose the experts and the router only how much each one's answer counts: what is lost is what the router
    knows (Roller et al. 2021, arXiv 2106.04426, compare routers so)."""
    dice = torch.Generator().manual_seed(seed)

    def rule(choice: Choice, experts: int) -> Choice:
        tokens, per_token = choice.expert_TK.shape
        expert_TK = torch.rand(tokens, experts, generator=dice).topk(per_token, dim=1).indices
        return choice._replace(expert_TK=expert_TK.to(choice.expert_TK.device))

    return _answered(rule)


def first_only() -> Change:
    """Only the best expert of each token answers, with the weight of all."""

    def rule(choice: Choice, _experts: int) -> Choice:
        weight_TK = torch.zeros_like(choice.weight_TK)
        weight_TK[:, 0] = choice.weight_TK.sum(1)
        return choice._replace(weight_TK=weight_TK)

    return _answered(rule)


@torch.inference_mode()
def losses(model: Transformer, ids: np.ndarray, machine: Machine, reading: Reading | None = None) -> Tensor:
    """The nats of each window, of what counts in the `reading`: (W,), fp64. ids: (W, T + 1)."""
    found = []
    rows = max(1, ROWS_OF_TOKENS // ids.shape[1])
    for start in range(0, len(ids), rows):
        batch = batch_of(ids[start : start + rows], reading=reading).map(lambda tensor: tensor.to(machine.device))
        with machine.autocast():
            nll, _ = model(batch.inputs_BT, batch.targets_BT, *batch.extras)
        found.append(batch.by_row(nll.double()).cpu())
    return torch.cat(found)


def cost(before_W: Tensor, after_W: Tensor) -> Cost:
    """The cost of a change from the nats of each window; the standard error is that of a ratio over windows."""
    share = ((after_W - before_W).sum() / before_W.sum()).item()
    rest_W = after_W - before_W - share * before_W
    windows = len(before_W)
    error = (windows / (windows - 1) * rest_W.square().sum()).sqrt() / before_W.sum()
    return Cost(share, error.item())

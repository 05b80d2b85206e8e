"""The router sends each token to its top K experts (Shazeer et al. 2017, arXiv 1701.06538).

It computes in fp32 whatever the rest does, because rounding would send tokens with a near-tie to another expert. It
returns what the step must know about the routing (losses.py makes the balancing loss of it) and stores nothing, so
recomputed or compiled forwards cannot count it twice.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLOSED = -1e9
"""the score of an expert that a token must do without; its probability is 0"""


class Routing(NamedTuple):
    """Sums over the tokens of one forward through one mixture layer; sums of micro-batches add up exactly."""

    load_E: Tensor
    """token-expert pairs sent to each expert (count, fp32, no gradient)"""
    prob_E: Tensor
    """router probability of each expert, summed over tokens (fp32)"""
    z: Tensor
    """squared log-partition of the router, summed over tokens (fp32 scalar)"""


class Choice(NamedTuple):
    """The chosen experts of each token and their weights."""

    expert_TK: Tensor
    """the experts of each token, best first (int64)"""
    weight_TK: Tensor
    """how much each one's answer counts (fp32); sums to 1 per token, but for K = 1: see Router"""


class Router(nn.Module):
    """Softmax over all experts, of which the K largest are renormalised to sum to 1.

    With K = 1 the weight is the probability itself, as in Switch (arXiv 2101.03961, eq. 2): renormalised it would be 1
    whatever the router says, and the loss would give the router no gradient.

    A biased router adds a bias to each probability before it takes the largest, and only there: it moves tokens from
    busy experts to idle ones without a loss on the weights (Wang et al. 2024, arXiv 2408.15664).
    """

    def __init__(self, dim: int, experts: int, per_token: int, biased: bool = False) -> None:
        super().__init__()
        self.per_token = per_token
        self.weight = nn.Parameter(torch.empty(experts, dim))
        self.register_buffer("bias_E", torch.zeros(experts) if biased else None)
        self.bias_E: Tensor | None

    def forward(self, x_TD: Tensor, closed_TE: Tensor | None = None) -> tuple[Choice, Routing]:
        """closed_TE: experts that a token must do without. The others share their probability; where fewer than K are
        left, the weight of the rest is 0, and where none is, the layer answers 0."""
        with torch.autocast(x_TD.device.type, enabled=False):
            scores_TE = F.linear(x_TD.float(), self.weight.float())
            if closed_TE is not None:
                scores_TE = scores_TE.masked_fill(closed_TE, CLOSED)
            prob_TE = scores_TE.softmax(dim=-1)
            if self.bias_E is None:
                top_TK, expert_TK = prob_TE.topk(self.per_token, dim=-1)
            else:
                favour_TE = prob_TE.detach() + self.bias_E
                if closed_TE is not None:
                    favour_TE = favour_TE.masked_fill(closed_TE, CLOSED)
                expert_TK = favour_TE.topk(self.per_token, dim=-1).indices
                top_TK = prob_TE.gather(-1, expert_TK)
            weight_TK = top_TK if self.per_token == 1 else top_TK / top_TK.sum(dim=-1, keepdim=True)
            if closed_TE is not None:
                weight_TK = weight_TK.masked_fill(closed_TE.gather(-1, expert_TK), 0.0)
            routing = Routing(
                load_E=_count(expert_TK, len(self.weight)),
                prob_E=prob_TE.sum(dim=0),
                z=scores_TE.logsumexp(dim=-1).square().sum(),
            )
        return Choice(expert_TK, weight_TK), routing


@torch.no_grad()
def move_biases(model: nn.Module, load_LE: Tensor, rate: float) -> None:
    """Move the routers' biases, once for each optimizer step and by the load of the whole step: up by `rate` for
    experts below the mean load, down for those above."""
    biases = [module.bias_E for module in model.modules() if isinstance(module, Router)]
    for bias_E, load_E in zip(biases, load_LE, strict=True):
        if bias_E is not None:
            bias_E.add_(rate * (load_E.mean() - load_E).sign())


def _count(expert_TK: Tensor, experts: int) -> Tensor:
    """How often each expert was chosen. A comparison instead of `bincount`: its shape is known before it runs."""
    all_E = torch.arange(experts, device=expert_TK.device)
    return (expert_TK.flatten()[:, None] == all_E).sum(dim=0, dtype=torch.float32)


def stack(routings: tuple[Routing, ...], like: Tensor) -> Routing:
    """All mixture layers in one Routing with a leading axis L; `like`, (L, E), gives the shape if L is 0."""
    if not routings:
        return Routing(load_E=like.clone(), prob_E=like.clone(), z=like.new_zeros(0))
    return Routing(*(torch.stack(parts) for parts in zip(*routings, strict=True)))

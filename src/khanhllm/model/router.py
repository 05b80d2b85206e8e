"""The router sends each token to its top K experts (Shazeer et al. 2017, arXiv 1701.06538).

It computes in fp32 whatever the rest does, because rounding would send tokens with a near-tie to another expert. It
returns what the step must know about the routing (losses.py makes the balancing loss of it) and stores nothing, so
recomputed or compiled forwards cannot count it twice.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
    """Softmax over all experts, of which the K largest are renormalised to sum to 1: that is, the softmax of their
    scores alone.

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

    def forward(
        self, x_TD: Tensor, closed_TE: Tensor | None = None, padding_T: Tensor | None = None
    ) -> tuple[Choice, Routing]:
        """closed_TE: the experts that a token must do without, bool, (T, E) or (1, E). The token goes to the next best.
        Probabilities are those of all experts, so a token that never wanted a closed one keeps every bit. Where fewer
        than K are open, the weight of the rest is 0; where none is, the layer answers 0.

        padding_T: tokens that only fill a row; they are routed, but do not count in the Routing.
        """
        with torch.autocast(x_TD.device.type, enabled=False):
            scores_TE = F.linear(x_TD.float(), self.weight.float())
            # transposed: on a CPU several times faster than along the few experts
            partition_T = scores_TE.T.logsumexp(dim=0)
            prob_ET = (scores_TE.T - partition_T).exp()
            ranked_TE = scores_TE.detach() if self.bias_E is None else prob_ET.detach().T + self.bias_E
            if closed_TE is not None:
                ranked_TE = ranked_TE.masked_fill(closed_TE, -torch.inf)
            rank_TK, expert_TK = ranked_TE.topk(self.per_token, dim=-1)
            top_KT = scores_TE.gather(-1, expert_TK).T
            if closed_TE is not None:
                top_KT = top_KT.masked_fill(rank_TK.T.isneginf(), -torch.inf)
            weight_TK = ((top_KT - partition_T).exp() if self.per_token == 1 else top_KT.softmax(dim=0)).T
            if closed_TE is not None:  # the softmax over closed ones alone is undefined
                weight_TK = weight_TK.masked_fill(rank_TK.isneginf(), 0)
            sent_TK, square_T = expert_TK, partition_T.square()
            if padding_T is not None:
                sent_TK = sent_TK.masked_fill(padding_T[:, None], len(self.weight))  # to no expert
                prob_ET, square_T = prob_ET.masked_fill(padding_T, 0), square_T.masked_fill(padding_T, 0)
            routing = Routing(load_E=count(sent_TK, len(self.weight)), prob_E=prob_ET.sum(dim=1), z=square_T.sum())
        return Choice(expert_TK, weight_TK), routing


@torch.no_grad()
def move_biases(model: nn.Module, load_LE: Tensor, rate: float) -> None:
    """Move the routers' biases, once for each optimizer step and by the load of the whole step: up by `rate` for
    experts below the mean load, down for those above."""
    biases = [module.bias_E for module in model.modules() if isinstance(module, Router)]
    for bias_E, load_E in zip(biases, load_LE, strict=True):
        if bias_E is not None:
            bias_E.add_(rate * (load_E.mean() - load_E).sign())


def count(expert_TK: Tensor, experts: int) -> Tensor:
    """How often each expert was chosen; `experts`, the one that is none, is not counted. Unlike `bincount`, a sum whose
    shape is known before it runs."""
    chosen_N = expert_TK.flatten()
    ones_N = torch.ones(1, device=chosen_N.device).expand(len(chosen_N))
    return torch.zeros(experts + 1, device=chosen_N.device).scatter_add_(0, chosen_N, ones_N)[:experts]


def stack(routings: tuple[Routing, ...], like: Tensor) -> Routing:
    """All mixture layers in one Routing with a leading axis L; `like`, (L, E), gives the shape if L is 0."""
    if not routings:
        return Routing(load_E=like.clone(), prob_E=like.clone(), z=like.new_zeros(0))
    return Routing(*(torch.stack(parts) for parts in zip(*routings, strict=True)))

"""What is minimised. Pure functions of tensors; the whole step obeys one formula, whatever its micro-batches:

    loss = sum of token losses / target tokens of the step
         + balance  x sum over mixture layers of  E * sum_e load_e * prob_e
         + router_z x sum over mixture layers of  mean over tokens of logsumexp(scores)^2

`load_e` is the share of token-expert pairs that expert e received and `prob_e` its mean router probability, both over
*all* micro-batches of the step: balance over a single sequence would forbid experts to specialise (Qiu et al. 2025,
arXiv 2501.11873). Even routing scores 1.0 per layer. Sources: Switch Transformer (arXiv 2101.03961, eq. 4), ST-MoE
(arXiv 2202.08906, eq. 5).

Every term is a sum over tokens divided by a number known before the step, so 1x8, 2x4 and 8x1 micro-batches add up to
the same gradient. Only the load must be known while micro-batches are still to come: it is taken from the previous
step, whose counts are complete (the way DeepSeek-V3 moves its router bias), or counted beforehand.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def token_nll(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int) -> Tensor:
    """-log p(target) of each token (nats, fp32), from hidden states and the output matrix.

    At most `chunk` rows of logits exist at one time: the backward pass makes them again, chunk by chunk.
    """
    if len(x_TD) <= chunk or not torch.is_grad_enabled():
        parts = [_nll(x, weight_VD, t) for x, t in zip(x_TD.split(chunk), targets_T.split(chunk), strict=True)]
    else:
        parts = [
            checkpoint(_nll, x, weight_VD, t, use_reentrant=False, preserve_rng_state=False)
            for x, t in zip(x_TD.split(chunk), targets_T.split(chunk), strict=True)
        ]
    return torch.cat(parts)


def _nll(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x_TD, weight_VD).float(), targets_T, reduction="none")


def load_balance(load_LE: Tensor, prob_LE: Tensor) -> Tensor:
    """Switch's balance of each layer, (L,), from sums (or shares) of load and probability; even routing gives 1.0."""
    load_LE = load_LE / load_LE.sum(-1, keepdim=True)
    prob_LE = prob_LE / prob_LE.sum(-1, keepdim=True)
    return load_LE.shape[-1] * (load_LE * prob_LE).sum(-1)


def even_load(layers: int, experts: int) -> list[list[float]]:
    """The load that the first step assumes, (L, E)."""
    return [[1 / experts] * experts for _ in range(layers)]


def share_of_step(
    nll_BT: Tensor, prob_LE: Tensor, z_L: Tensor, load_LE: Tensor, step_tokens: int, balance: float, router_z: float
) -> Tensor:
    """This micro-batch's share of the step's loss: the shares of all micro-batches add up to it.

    prob_LE and z_L are sums over the micro-batch's tokens, load_LE each expert's share of the load of a whole step.
    """
    balanced = load_LE.shape[-1] * (load_LE * prob_LE).sum()
    return (nll_BT.sum() + balance * balanced + router_z * z_L.sum()) / step_tokens

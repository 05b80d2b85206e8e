"""The loss, as pure functions of tensors. One formula holds for the whole step, whatever its micro-batches:

    loss = sum of token losses / target tokens of the step
         + balance  x sum over mixture layers of  E * sum_e load_e * prob_e
         + router_z x sum over mixture layers of  mean over tokens of logsumexp(scores)^2

`load_e` is the share of token-expert pairs that expert e received and `prob_e` its mean router probability, both over
*all* micro-batches of the step: balance over a single sequence would forbid experts to specialise (Qiu et al. 2025,
arXiv 2501.11873). Even routing scores 1.0 per layer. Sources: Switch Transformer (arXiv 2101.03961, eq. 4), ST-MoE
(arXiv 2202.08906, eq. 5).

Every term is a sum over tokens divided by a number known before the step, so 1x8, 2x4 and 8x1 micro-batches add up to
the same gradient. Only the load must be known before all micro-batches are seen. It comes from the previous step, whose
counts are complete (the way DeepSeek-V3 moves its router bias), or from counting beforehand.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from khanhllm.model.router import Routing, stack
from khanhllm.schema import LossConfig


def token_nll(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int) -> Tensor:
    """-log p(target) of each token (nats, fp32), from hidden states and the output matrix.

    At most `chunk` rows of logits exist at one time, and each is made once: its gradient is taken while it is there.
    """
    device = x_TD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TD.dtype
    return _TokenNLL.apply(x_TD, weight_VD, targets_T, chunk, dtype)  # type: ignore[no-any-return]


class _TokenNLL(torch.autograd.Function):
    """The forward pass also computes the gradients of the *sum* over tokens. They suffice if the incoming gradient is
    one number for all tokens, as from `share_of_step`. For any other, the backward pass repeats the chunks."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(x_TD, weight_VD, targets_T)
        ctx.chunk, ctx.dtype, ctx.of_sum = chunk, dtype, None
        if any(ctx.needs_input_grad):
            nll_T, *ctx.of_sum = _with_gradients(x_TD, weight_VD, targets_T, chunk, dtype)
            return nll_T
        weight_VD = weight_VD.to(dtype)
        chunks = zip(x_TD.to(dtype).split(chunk), targets_T.split(chunk), strict=True)
        return torch.cat([_nll(x_CD, weight_VD, targets_C)[0] for x_CD, targets_C in chunks])

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():  # create_graph: autograd cannot look inside, and would leave this part out unsaid
            raise RuntimeError("the loss of the tokens has no second derivative")
        # an expanded scalar: seen without waiting for the device
        if ctx.of_sum and len(grad_T) and not any(grad_T.stride()):
            x_grad_TD, weight_grad_VD = (gradient.mul_(grad_T[0]) for gradient in ctx.of_sum)
            ctx.of_sum = None  # scaled in place, so they serve only once
        else:
            x_TD, weight_VD, targets_T = ctx.saved_tensors
            _, x_grad_TD, weight_grad_VD = _with_gradients(x_TD, weight_VD, targets_T, ctx.chunk, ctx.dtype, grad_T)
        return x_grad_TD, weight_grad_VD, None, None, None


def _with_gradients(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int, dtype: torch.dtype, grad_T: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """nll_T and the gradients for x and the weight, of the sum of tokens or of the sum weighted by `grad_T`."""
    nll_T = torch.empty(len(x_TD), dtype=_exact(dtype), device=x_TD.device)
    x_grad_TD = torch.empty_like(x_TD)
    weight_grad_VD = torch.zeros_like(weight_VD, dtype=_exact(dtype))
    weight = weight_VD.to(dtype)
    for start in range(0, len(x_TD), chunk):
        rows = slice(start, start + chunk)
        x_CD = x_TD[rows].to(dtype)
        nll_T[rows], slope_CV = _nll(x_CD, weight, targets_T[rows])
        slope_CV.scatter_add_(1, targets_T[rows, None], slope_CV.new_full((1, 1), -1.0).expand(len(x_CD), 1))
        if grad_T is not None:
            slope_CV.mul_(grad_T[rows, None])
        slope_CV = slope_CV.to(dtype)
        x_grad_TD[rows] = slope_CV @ weight
        if weight_grad_VD.dtype == dtype:
            weight_grad_VD.addmm_(slope_CV.T, x_CD)
        else:
            weight_grad_VD.add_(slope_CV.T @ x_CD)
        del slope_CV  # else two chunks of logits would exist at once
    return nll_T, x_grad_TD, weight_grad_VD


def _nll(x_CD: Tensor, weight_VD: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """-log p(target), (C,), and all probabilities, (C, V), which overwrite the logits."""
    logits_CV = (x_CD @ weight_VD.T).to(_exact(x_CD.dtype))
    target = logits_CV.gather(1, targets_C[:, None])
    top = logits_CV.amax(dim=-1, keepdim=True)
    prob_CV = torch.softmax(logits_CV, dim=-1, out=logits_CV)
    # log of the partition from the likeliest token, whose probability is never too small for a logarithm
    return (top - prob_CV.amax(dim=-1, keepdim=True).log() - target).squeeze(1), prob_CV


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def load_balance(load_LE: Tensor, prob_LE: Tensor) -> Tensor:
    """Switch's balance of each layer, (L,), from sums (or shares) of load and probability; even routing gives 1.0."""
    load_LE = load_LE / load_LE.sum(-1, keepdim=True)
    prob_LE = prob_LE / prob_LE.sum(-1, keepdim=True)
    return load_LE.shape[-1] * (load_LE * prob_LE).sum(-1)


def even_load(layers: int, experts: int) -> Tensor:
    """The load that the first step assumes, (L, E)."""
    return torch.full((layers, experts), 1 / experts)


def share_of_step(
    nll_BT: Tensor,
    prob_LE: Tensor,
    z_L: Tensor,
    load_LE: Tensor,
    step_tokens: int,
    balance: float,
    router_z: float,
    counted: int | None = None,
) -> Tensor:
    """This micro-batch's share of the step's loss: the shares of all micro-batches add up to it.

    prob_LE and z_L are sums over the micro-batch's tokens, load_LE each expert's share of the load of a whole step.
    step_tokens: tokens of the whole step that reach the routers. counted: targets of the whole step that count, if
    they are not as many.
    """
    balanced = load_LE.shape[-1] * (load_LE * prob_LE).sum()
    nll = nll_BT.sum() if counted is None else nll_BT.sum() * (step_tokens / max(1, counted))
    return (nll + balance * balanced + router_z * z_L.sum()) / step_tokens


def micro_batch_loss(
    model: nn.Module,
    inputs_BT: Tensor,
    targets_BT: Tensor,
    load_LE: Tensor,
    step_tokens: int,
    weights: LossConfig,
    autocast: AbstractContextManager[None],
    counted: int | None = None,
    extras: tuple[Tensor | None, ...] = (),
) -> tuple[Tensor, Tensor, Routing]:
    """Forward: this micro-batch's share of the step's loss, its sum of token losses (nats) and its summed routing of
    all mixture layers. See `share_of_step`. extras: what the model takes beside inputs and targets."""
    with autocast:
        nll_BT, routings = model(inputs_BT, targets_BT, *extras)
    routing_L = stack(routings, like=load_LE)
    loss = share_of_step(
        nll_BT, routing_L.prob_E, routing_L.z, load_LE, step_tokens, weights.balance, weights.router_z, counted
    )
    return loss, nll_BT.sum().detach(), Routing(*(tensor.detach() for tensor in routing_L))

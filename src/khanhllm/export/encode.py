"""The same function as a model of another shape: what an architecture elsewhere does not have, written in what it has.

Each takes and returns a shape and its weights by name, in our own terms, so that our own code can compute both.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor

from khanhllm.errors import UserError
from khanhllm.model.counts import on_paper
from khanhllm.model.roles import Role, role
from khanhllm.schema import ModelConfig

Weights = dict[str, Tensor]
LARGEST_HALF = 65_504
STEEPEST = 10
SMALL = 10
"""powers of two: of s in `as_swiglu`, and of what `as_wider` divides by"""


def as_divided(model: ModelConfig, weights: Weights) -> tuple[ModelConfig, Weights]:
    """The vectors of tokens as `token_norm` makes them."""
    if not model.token_norm:
        return model, weights
    token_VD = weights["embedding.token.weight"].float()
    divided_VD = F.rms_norm(token_VD, token_VD.shape[-1:], eps=model.norm_eps)
    return model.model_copy(update={"token_norm": False}), weights | {"embedding.token.weight": divided_VD}


def as_unscaled(model: ModelConfig, weights: Weights) -> tuple[ModelConfig, Weights]:
    """The residual stream without `stream_scale`: x / c for x, where c is the product of the numbers so far.

    Norms do not see it, but for `norm_eps`. So what is written into the stream is divided by c, and so are normed value
    embeddings, which the model divides by the root mean square of x. The largest c then multiplies all of them, so that
    no x becomes smaller and `norm_eps` counts for less. UserError unless all numbers are positive.
    """
    if not model.stream_scale or model.embedding_skip:
        return model, weights
    encoded = dict(weights)
    scale_L = 1 + encoded.pop("embedding_skip.stream_L").float()
    if scale_L.min() <= 0:
        what = f"layer {int(scale_L.argmin())} multiplies the stream by {float(scale_L.min()):.3g}"
        raise UserError(f"model.stream_scale: {what}, and only numbers above 0 can be exported")
    product_L = scale_L.cumprod(0)
    for name, weight in encoded.items():
        added = role(name) is Role.ADDED and (name.startswith("embedding.") or model.value_embedding == "normed")
        if added or role(name) in (Role.TOKEN, Role.OUTPUT):
            layer = re.search(r"\d+", name)
            encoded[name] = weight.float() * product_L.max() / (product_L[int(layer[0])] if layer else 1)
    return model.model_copy(update={"stream_scale": False}), encoded


def as_wider(model: ModelConfig, weights: Weights) -> tuple[ModelConfig, Weights]:
    """Normed value embeddings as further features of the residual stream, n times as wide, with n times the heads.

    Nothing writes the further features, and each is read by the values of its layer alone. They are divided by 2^10, so
    that they hardly count in the norm's mean square, and the norm's gain multiplies them again. What writes into the
    stream is multiplied by sqrt(n), because that mean is over n times the features; the gains take it back. Further
    heads are zeros.
    """
    if model.value_embedding != "normed":
        return model, weights
    tables = {name.split(".")[2]: weights[name] for name in weights if name.startswith("value_embedding.")}
    size = model.key_value_heads * model.head_dim
    n = 1 + math.ceil(len(tables) * size / model.dim)
    grown = {"dim": n * model.dim, "heads": n * model.heads, "kv_heads": n * model.kv_heads, "value_embedding": False}
    shape = model.model_copy(update=grown)
    encoded = {}
    for name, place in on_paper(shape).state_dict().items():
        weight = weights[name].float()
        if name.endswith(("token.weight", "out.weight", "down.weight", "down")):
            weight = weight * n**0.5
        elif name.endswith("norm.weight") and len(place) == shape.dim:  # not those of query and key
            weight = weight / n**0.5
        for side, length in enumerate(place.shape):
            weight = _widen(weight, length, side)
        encoded[name] = weight
    for nth, (layer, table_VS) in enumerate(tables.items()):
        own = slice(model.dim + nth * size, model.dim + (nth + 1) * size)
        encoded["embedding.token.weight"][:, own] = table_VS * 2.0**-SMALL
        encoded[f"blocks.{layer}.attention_norm.weight"][own] = 2.0**SMALL
        encoded[f"blocks.{layer}.attention.value.weight"][:size, own] = torch.eye(size)
    return shape, encoded


def as_swiglu(model: ModelConfig, weights: Weights) -> tuple[ModelConfig, Weights]:
    """relu2 layers as swiglu layers: relu(u)^2 = lim silu(s u) u / s.

    With gate = s u each inner unit is off by at most 0.48 / s^2: u^2 / (1 + exp(s |u|)) at its largest. s is 2^10, or
    less where s u could leave the range of half precision. The division by s is shared between up and down: half each,
    so that in types with scales in half precision neither becomes too small, or more to up where the product of gate
    and up, about u^2 times what is left to down, could leave that range too.
    """
    if model.feedforward == "swiglu":
        return model, weights
    encoded = dict(weights)
    for name, up in weights.items():
        layer, _, part = name.partition(".feedforward.")
        if not part.endswith(("up", "up.weight")):
            continue
        # a row w reads x = gain n with |n| = sqrt(D), so |w x| <= |w gain| sqrt(D)
        gain_D = weights[f"{layer}.feedforward_norm.weight"]
        read = up * gain_D if up.ndim == 2 else up.mT * gain_D
        most = float(read.norm(dim=-1).max()) * math.sqrt(model.dim)
        steep = min(STEEPEST, _powers(most))
        to_up = min(steep, max(-(-steep // 2), steep - _powers(most**2)))
        gate, down = (name.replace("up", other, 1) for other in ("gate", "down"))
        encoded[gate] = up * 2.0**steep
        encoded[name] = up / 2.0**to_up
        encoded[down] = weights[down] / 2.0 ** (steep - to_up)
    return model.model_copy(update={"feedforward": "swiglu"}), encoded


def _powers(number: float) -> int:
    """How often it can be doubled in half precision."""
    return math.floor(math.log2(LARGEST_HALF / max(number, 1e-30)))


def as_mixtures(model: ModelConfig, weights: Weights) -> tuple[ModelConfig, Weights]:
    """Every dense layer as a mixture, for architectures in which all layers are one.

    The layer is cut into K pieces, which are the experts 0 .. K-1 and once more the last K. The routers' rows of the
    first are +w and of the last -w, all others zero: whatever the sign of w x, the softmax prefers one whole set, each
    with weight 1/K, which the pieces' down matrices take back. With fewer than 2 K experts, every one is the whole
    layer. All experts get the width of the widest, filled with zeros. UserError for K = 1, where the router's
    probability stays as a weight.
    """
    if model.experts_per_token == 1 and model.moe_layers and "D" in model.pattern:
        raise UserError(
            "with model.experts_per_token 1 a dense layer cannot be written as a mixture; export without it"
        )
    experts, chosen = model.experts, model.experts_per_token
    pieces = chosen if experts >= 2 * chosen else 1
    width = max(model.expert_width, math.ceil(model.hidden / pieces))
    encoded = {}
    for name, weight in weights.items():
        layer, _, part = name.partition(".feedforward.")
        if ".experts." in name:
            side = 1 if part.endswith("down") else 2
            encoded[name] = _widen(weight, width, side)
        elif part in ("gate.weight", "up.weight", "down.weight"):
            short = part.removesuffix(".weight")
            matrix = weight.T  # (in, out), as stacked experts are
            side = 0 if short == "down" else 1
            share = math.ceil(model.hidden / pieces)
            cut = [_widen(piece, width, side) for piece in _widen(matrix, share * pieces, side).split(share, side)]
            whole = torch.stack(cut) * (pieces if short == "down" else 1)
            if pieces == 1:
                stack = whole.expand(experts, -1, -1).contiguous()
            else:
                stack = whole.new_zeros(experts, *whole.shape[1:])
                stack[:pieces], stack[-pieces:] = whole, whole
            encoded[f"{layer}.feedforward.experts.{short}"] = stack
            if short == "gate":
                encoded[f"{layer}.feedforward.router.weight"] = _signs(model, weights, layer, pieces)
        else:
            encoded[name] = weight
    shape = {"pattern": "M" * len(model.pattern), "expert_hidden": width, "hidden": width}
    return model.model_copy(update=shape), encoded


def _widen(weight: Tensor, size: int, side: int) -> Tensor:
    """`weight` with zeros appended up to `size` along `side`."""
    shape = list(weight.shape)
    shape[side] = size - shape[side]
    return torch.cat((weight, weight.new_zeros(shape)), side)


def _signs(model: ModelConfig, weights: Weights, layer: str, pieces: int) -> Tensor:
    """The router of a dense layer: (E, D)."""
    gain_D = weights[f"{layer}.feedforward_norm.weight"]
    row_D = torch.randn(model.dim, generator=torch.Generator().manual_seed(0)).to(gain_D.dtype)
    router_ED = gain_D.new_zeros(model.experts, model.dim)
    if model.experts >= 2 * model.experts_per_token:
        router_ED[:pieces], router_ED[-pieces:] = row_D, -row_D
    return router_ED

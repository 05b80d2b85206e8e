"""The same function as a model of another shape: what an architecture elsewhere does not have, written in what it has.

Each takes and returns a shape and its weights by name, in our own terms, so that our own code can compute both.
"""

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from khanhllm.errors import UserError
from khanhllm.model.counts import on_paper
from khanhllm.model.roles import Role, role
from khanhllm.model.rope import Rope
from khanhllm.schema import ModelConfig

Weights = dict[str, Tensor]
LARGEST_HALF = 65_504
STEEPEST = 10
SMALL = 10
"""powers of two: of s in `as_swiglu`, and of what `as_wider` divides by"""
REMEDY = "--to hf --remote-code writes it with model code of its own"
MOST_LAYERS, LEAST_HIDDEN = 256, 32
SHIFT = "token_shift.shift_LD"
LOUD = 2.0**8
"""factor on a query and key, for the norm that follows to find them far above its epsilon"""
MARGIN = 30
"""of the position before over all others in the scores of `as_deeper`; e^-30 of a weight is below fp32's rounding"""
NARROW = 0.01
"""least share that this margin must be of the scores, or rounding would drown it"""


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
    if model.token_shift:
        encoded[SHIFT] = encoded[SHIFT].float() * (product_L.max() / product_L)[:, None]
    for name, weight in encoded.items():
        added = role(name) is Role.ADDED and (name.startswith("embedding.") or model.value_embedding == "normed")
        if added or role(name) in (Role.TOKEN, Role.OUTPUT):
            layer = re.search(r"\d+", name)
            encoded[name] = weight.float() * product_L.max() / (product_L[int(layer[0])] if layer else 1)
    return model.model_copy(update={"stream_scale": False}), encoded


def as_wider(model: ModelConfig, weights: Weights) -> tuple[ModelConfig, Weights]:
    """Normed value embeddings as further features of the residual stream, with further heads, n times as many of both.
    With `token_shift`, the last feature is one number, whatever the token is, for `as_deeper`.

    Nothing writes the further features, and each is read by the values of its layer alone. They are divided by 2^10, so
    that they hardly count in the norm's mean square, and the norm's gain multiplies them again. What writes into the
    stream is multiplied by sqrt(n), because that mean is over n times the features; the gains take it back. Further
    heads are zeros.
    """
    normed = model.value_embedding == "normed"
    if not normed and not model.token_shift:
        return model, weights
    tables = {name.split(".")[2]: weights[name] for name in weights if normed and name.startswith("value_embedding.")}
    size, group = model.key_value_heads * model.head_dim, model.heads // model.key_value_heads
    unit = group * model.head_dim  # of heads that share a key
    units = model.key_value_heads + math.ceil((len(tables) * size + model.token_shift) / unit)
    if model.token_shift:
        units = max(units, model.heads)  # value heads for all features
    grown = {"dim": units * unit, "heads": units * group, "kv_heads": model.kv_heads and units}
    shape = model.model_copy(update=grown | {"value_embedding": False})
    n = shape.dim / model.dim
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
    if model.token_shift:
        encoded["embedding.token.weight"][:, -1] = 2.0**-SMALL
    return shape, encoded


def widened(weights: Mapping[str, Tensor]) -> bool:
    """Whether `as_wider` made them: a norm's gain that makes small features large again."""
    return any(name.endswith("attention_norm.weight") and weight.max() >= 2**SMALL for name, weight in weights.items())


def as_deeper(model: ModelConfig, weights: Weights) -> tuple[ModelConfig, Weights]:
    """`token_shift`, after `as_wider`, as a layer before each: its heads look at the position before and bring a piece
    of its vector each, and the output matrix multiplies each feature by its number. The feed-forward is zero.

    Query and key are the same at all positions, read from the feature that is one number, and the key is rotated on by
    one position: so the position before has the largest score, by MARGIN. The first position sees itself alone.
    """
    if not model.token_shift:
        return model, weights
    if 2 * len(model.pattern) > MOST_LAYERS:
        raise UserError(f"model.token_shift doubles the layers in this form, which may have {MOST_LAYERS}; {REMEDY}")
    small = {"hidden": model.hidden if "D" in model.pattern else LEAST_HIDDEN}  # of the added layers
    pattern = "".join("D" + letter for letter in model.pattern)
    shape = model.model_copy(update=small | {"token_shift": False, "pattern": pattern})
    encoded = {re.sub(r"^blocks\.(\d+)", _second, name): weight for name, weight in weights.items()}
    added, d, group = _looking_back(shape), model.head_dim, model.heads // model.key_value_heads
    for layer, shift_D in enumerate(encoded.pop(SHIFT)):
        own = {name: weight.clone() for name, weight in added.items()}  # files hold no tensor twice
        for piece in range(model.key_value_heads):
            to, head = (slice(nth * d, (nth + 1) * d) for nth in (piece, piece * group))
            own["attention.out.weight"][to, head] = torch.diag(shift_D[to])
        encoded |= {f"blocks.{2 * layer}.{name}": weight for name, weight in own.items()}
    return shape, encoded


def _second(found: re.Match[str]) -> str:
    return f"blocks.{2 * int(found[1]) + 1}"


def _looking_back(model: ModelConfig) -> Weights:
    """The weights of a dense layer whose heads bring the vector of the position before, a piece each."""
    layer = {
        name: torch.full(place.shape, float("norm" in name))
        for name, place in on_paper(model).blocks[0].state_dict().items()
    }
    query_d, gain = _of_places(model)
    key_d = Rope(model.head_dim, 2, model.rope_theta)(query_d.view(1, 1, 1, -1), start=1).flatten()
    layer["attention.query_norm.weight"] *= gain
    layer["attention.key_norm.weight"] *= gain
    layer["attention_norm.weight"][-1] = 2.0**SMALL
    layer["attention.query.weight"][:, -1] = LOUD * query_d.repeat(model.heads)
    layer["attention.key.weight"][:, -1] = LOUD * key_d.repeat(model.key_value_heads)
    layer["attention.value.weight"].fill_diagonal_(1)
    return layer


def _of_places(model: ModelConfig) -> tuple[Tensor, float]:
    """A query (d,) that, as a key rotated on by one position, matches best at the position before, and the gain of the
    norms of both with which that score exceeds all others within the context by MARGIN. It stands in the fast features,
    since slow ones hardly tell neighbours apart. UserError if a head is too narrow."""
    pairs = model.head_dim // 2
    far_T = torch.arange(1, max(2, model.context - 1), dtype=torch.float64)  # from the position before
    speed_f = model.rope_theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    less_Tf = 1 - torch.outer(far_T, speed_f).cos()
    ahead_f = less_Tf.cumsum(1).amin(0) / torch.arange(1, pairs + 1)  # by the number of fast features
    if (ahead := float(ahead_f.max())) < NARROW:
        what = f"heads of {model.head_dim} features cannot tell {model.context} positions apart"
        raise UserError(f"model.token_shift: {what}; {REMEDY}")
    query_d = (torch.arange(model.head_dim) % pairs <= int(ahead_f.argmax())).float()
    return query_d, (MARGIN / (ahead * model.head_dim**0.5)) ** 0.5


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
    down = [weight for name, weight in weights.items() if name.endswith("down.weight")]  # those of experts are stacked
    if model.experts_per_token == 1 and any(weight.any() for weight in down):
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

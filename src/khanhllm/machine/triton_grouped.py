"""Two products for all experts at once, in Triton, for cards on which torch's `grouped_mm` makes the host wait.

    grouped_mm          out[n] = x[n] @ weight[expert of n]          forward, and with weight.mT the gradient of x
    grouped_mm_wgrad    out[e] = x[rows of e]^T @ grad[rows of e]    the gradient of the weights

Rows are sorted by expert and `end_E` (int32, on the device) counts them cumulatively. The host never reads how many
rows an expert has: grids come from static shapes alone, each program reads its task from `end_E`, and a program without
one stops at once. Sums are in fp32.

Both are custom operators, opaque to the compiler, and not `triton_op`. A compiler that sees inside would fix the
precision of fp32 products at tracing, tune again by its own rules, and leave selective checkpointing no operator to
name; and it could not fuse anything into them. Importing this file needs triton.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from khanhllm.model.counts import product_flops
from khanhllm.model.experts import Backend

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
GROUP = tl.constexpr(8)
"""rows of tiles computed together, column by column, so that what they read stays in the L2 cache"""


def _tile(height: int, depth: int, width: int, warps: int, stages: int) -> Any:
    """The work of one program: height x width of the output, summed over steps of depth."""
    return triton.Config({"HEIGHT": height, "DEPTH": depth, "WIDTH": width}, num_warps=warps, num_stages=stages)


# From small to large. In 16 bits all fit into the 99 KB of shared memory of SM86 and SM89.
TILES = [
    _tile(32, 64, 64, 4, 4),
    _tile(64, 32, 128, 4, 4),
    _tile(128, 32, 64, 4, 4),
    _tile(128, 32, 128, 4, 4),
    _tile(128, 64, 128, 8, 3),
    _tile(128, 32, 256, 8, 4),
    _tile(128, 64, 256, 8, 3),
]


def _tuned(height: str, depth: str, layout: str) -> Callable[[Any], Any]:
    """A tuner for a kernel whose tiles cover the arguments named `height` and `depth`. It measures once for each shape
    and layout of a layer and each order of magnitude of the load, not for each load, and keeps its results on disk."""

    def worthwhile(tiles: list[Any], named: dict[str, Any], **more: Any) -> list[Any]:
        """Leave out tiles that would be half empty."""
        size = {**named, **more}
        if size["PRECISION"] == "ieee":  # no tensor cores: large tiles only take long to compile
            tiles = [tile for tile in tiles if tile.kwargs["HEIGHT"] * tile.kwargs["WIDTH"] <= 64 * 128]
        room = {"HEIGHT": size[height], "DEPTH": size[depth], "WIDTH": size["outputs"]}
        return [tile for tile in tiles if all(tile.kwargs[side] < 2 * room[side] for side in room)] or tiles[:1]

    return triton.autotune(  # without a device there is nothing to measure
        TILES[:1] if INTERPRETED.value else TILES,
        key=["inputs", "outputs", "share", layout, "PRECISION"],
        prune_configs_by={"early_config_prune": worthwhile},
        cache_results=True,
    )


@triton.jit
def _place(program: int, tiles_high: int, tiles_wide: int) -> tuple[int, int]:
    """Number of a program -> (row, column) of its tile: column by column within bands of GROUP rows."""
    band = program // (GROUP * tiles_wide)
    top = band * GROUP
    height = tl.minimum(tiles_high - top, GROUP)
    within = program - band * GROUP * tiles_wide
    return top + within % height, within // height


@triton.jit
def _add_product(total: tl.tensor, left: tl.tensor, right: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    if INTERPRETED:  # which would multiply the bits of bf16 as integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@_tuned(height="share", depth="inputs", layout="weight_o")
@triton.heuristics(
    {
        "WHOLE_I": lambda size: size["inputs"] % size["DEPTH"] == 0,
        "WHOLE_O": lambda size: size["outputs"] % size["WIDTH"] == 0,
    }
)
@triton.jit(do_not_specialize=["n", "experts", "share"])
def _grouped_mm(
    x_NI: tl.tensor,
    weight_EIO: tl.tensor,
    end_E: tl.tensor,
    out_NO: tl.tensor,
    n: int,
    experts: int,
    inputs: int,
    outputs: int,
    share: int,  # rows per expert as a power of two, for the tuner alone
    x_n: int,  # strides
    x_i: int,
    weight_e: int,
    weight_i: int,
    weight_o: int,
    LANES: tl.constexpr,
    PRECISION: tl.constexpr,
    HEIGHT: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE_I: tl.constexpr,
    WHOLE_O: tl.constexpr,
) -> None:
    """Tiles of HEIGHT rows that end where an expert's rows end: at most n // HEIGHT whole ones and a rest for each."""
    tile, column = _place(tl.program_id(0), n // HEIGHT + experts, tl.cdiv(outputs, WIDTH))
    lane = tl.arange(0, LANES)
    end = tl.load(end_E + lane, mask=lane < experts, other=0)
    start = tl.load(end_E + lane - 1, mask=(lane > 0) & (lane < experts), other=0)
    tiles = tl.cdiv(end - start, HEIGHT)
    above = tl.cumsum(tiles)  # tiles of this expert and all before
    expert = tl.sum((above <= tile).to(tl.int32))
    if expert >= experts:
        return
    mine = lane == expert
    first = tl.sum(tl.where(mine, start + (tile - above + tiles) * HEIGHT, 0))
    stop = tl.sum(tl.where(mine, end, 0))

    row = first + tl.arange(0, HEIGHT)
    known = tl.minimum(row, stop - 1).to(tl.int64)  # rows past the end repeat the last one and are not stored
    i = tl.arange(0, DEPTH)
    o = column * WIDTH + tl.arange(0, WIDTH)
    in_o = (o < outputs) | WHOLE_O
    x_at = x_NI + known[:, None] * x_n + i[None, :].to(tl.int64) * x_i
    weight_at = weight_EIO + expert.to(tl.int64) * weight_e
    weight_at += i[:, None].to(tl.int64) * weight_i + o[None, :].to(tl.int64) * weight_o
    total = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for done in range(0, inputs, DEPTH):
        in_i = (i < inputs - done) | WHOLE_I
        x = tl.load(x_at, mask=in_i[None, :], other=0.0)
        weight = tl.load(weight_at, mask=in_i[:, None] & in_o[None, :], other=0.0)
        total = _add_product(total, x, weight, PRECISION)
        x_at += DEPTH * x_i
        weight_at += DEPTH * weight_i
    out_at = out_NO + row[:, None].to(tl.int64) * outputs + o[None, :]
    tl.store(out_at, total.to(out_NO.dtype.element_ty), mask=(row < stop)[:, None] & in_o[None, :])


@_tuned(height="inputs", depth="share", layout="x_i")
@triton.heuristics(
    {
        "WHOLE_I": lambda size: size["inputs"] % size["HEIGHT"] == 0,
        "WHOLE_O": lambda size: size["outputs"] % size["WIDTH"] == 0,
    }
)
@triton.jit(do_not_specialize=["share"])
def _grouped_mm_wgrad(
    x_NI: tl.tensor,
    grad_NO: tl.tensor,
    end_E: tl.tensor,
    out_EIO: tl.tensor,
    inputs: int,
    outputs: int,
    share: int,
    x_n: int,
    x_i: int,
    grad_n: int,
    grad_o: int,
    PRECISION: tl.constexpr,
    HEIGHT: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE_I: tl.constexpr,
    WHOLE_O: tl.constexpr,
) -> None:
    """Tiles of one expert's matrix, each summed over all rows of that expert."""
    tiles_high, tiles_wide = tl.cdiv(inputs, HEIGHT), tl.cdiv(outputs, WIDTH)
    expert = tl.program_id(0) // (tiles_high * tiles_wide)
    high, wide = _place(tl.program_id(0) % (tiles_high * tiles_wide), tiles_high, tiles_wide)
    start = tl.load(end_E + expert - 1, mask=expert > 0, other=0)
    stop = tl.load(end_E + expert)

    n = tl.arange(0, DEPTH)
    i = high * HEIGHT + tl.arange(0, HEIGHT)
    o = wide * WIDTH + tl.arange(0, WIDTH)
    in_i = (i < inputs) | WHOLE_I
    in_o = (o < outputs) | WHOLE_O
    row = (start + n).to(tl.int64)
    x_at = x_NI + i[:, None].to(tl.int64) * x_i + row[None, :] * x_n
    grad_at = grad_NO + row[:, None] * grad_n + o[None, :].to(tl.int64) * grad_o
    total = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for done in range(start, stop, DEPTH):
        in_n = n < stop - done
        x = tl.load(x_at, mask=in_i[:, None] & in_n[None, :], other=0.0)  # transposed
        grad = tl.load(grad_at, mask=in_n[:, None] & in_o[None, :], other=0.0)
        total = _add_product(total, x, grad, PRECISION)
        x_at += DEPTH * x_n
        grad_at += DEPTH * grad_n
    out_at = out_EIO + (expert.to(tl.int64) * inputs + i[:, None]) * outputs + o[None, :]
    tl.store(out_at, total.to(out_EIO.dtype.element_ty), mask=in_i[:, None] & in_o[None, :])


def _share(n: int, experts: int) -> int:
    """Rows per expert, rounded to a power of two: all that the tuner learns about the load."""
    return 1 << (n // experts).bit_length()


def _precision(dtype: torch.dtype) -> str:
    """The precision of fp32 products that torch is set to; 16-bit inputs are exact in tensor cores anyway."""
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


@torch.library.custom_op("khanhllm::triton_grouped_mm", mutates_args=())
def grouped_mm(x_NI: Tensor, weight_EIO: Tensor, end_E: Tensor) -> Tensor:
    """Each row times its expert's matrix -> (N, O), in the dtype that both inputs share; any strides."""
    n, (experts, inputs, outputs) = len(x_NI), weight_EIO.shape
    out_NO = x_NI.new_empty(n, outputs)
    with torch.cuda.device_of(x_NI):
        _grouped_mm[lambda tile: ((n // tile["HEIGHT"] + experts) * triton.cdiv(outputs, tile["WIDTH"]),)](
            x_NI,
            weight_EIO,
            end_E,
            out_NO,
            n,
            experts,
            inputs,
            outputs,
            _share(n, experts),
            *x_NI.stride(),
            *weight_EIO.stride(),
            LANES=triton.next_power_of_2(experts),
            PRECISION=_precision(x_NI.dtype),
        )
    return out_NO


@torch.library.custom_op("khanhllm::triton_grouped_mm_wgrad", mutates_args=())
def grouped_mm_wgrad(x_NI: Tensor, grad_NO: Tensor, end_E: Tensor) -> Tensor:
    """For each expert the transposed rows of x times the rows of grad -> (E, I, O); zeros where it has no rows."""
    experts, inputs, outputs = len(end_E), x_NI.shape[1], grad_NO.shape[1]
    out_EIO = x_NI.new_empty(experts, inputs, outputs)
    with torch.cuda.device_of(x_NI):
        _grouped_mm_wgrad[
            lambda tile: (experts * triton.cdiv(inputs, tile["HEIGHT"]) * triton.cdiv(outputs, tile["WIDTH"]),)
        ](
            x_NI,
            grad_NO,
            end_E,
            out_EIO,
            inputs,
            outputs,
            _share(len(x_NI), experts),
            *x_NI.stride(),
            *grad_NO.stride(),
            PRECISION=_precision(x_NI.dtype),
        )
    return out_EIO


@grouped_mm.register_fake
def _(x_NI: Tensor, weight_EIO: Tensor, end_E: Tensor) -> Tensor:
    return x_NI.new_empty(len(x_NI), weight_EIO.shape[2])


@grouped_mm_wgrad.register_fake
def _(x_NI: Tensor, grad_NO: Tensor, end_E: Tensor) -> Tensor:
    return x_NI.new_empty(len(end_E), x_NI.shape[1], grad_NO.shape[1])


BACKEND = Backend(torch.ops.khanhllm.triton_grouped_mm.default, torch.ops.khanhllm.triton_grouped_mm_wgrad.default)
register_flop_formula([torch.ops.khanhllm.triton_grouped_mm, torch.ops.khanhllm.triton_grouped_mm_wgrad])(product_flops)

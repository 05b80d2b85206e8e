"""What the Triton kernels must obey. `test_triton_grouped` runs this file in processes of its own: in triton's
interpreter, which must be asked for before triton is imported, and on a card where there is one."""

import pytest
import torch
from torch import Tensor

from khanhllm.machine import triton_grouped
from khanhllm.machine.triton_grouped import TILES, grouped_mm, grouped_mm_wgrad

torch.set_num_threads(1)
DEVICE = "cpu" if triton_grouped.INTERPRETED.value else "cuda"
LOADS = {"uneven": (17, 3, 50, 1), "some empty": (0, 40, 0, 25), "all on one": (0, 0, 70), "one": (5,), "none": (0, 0)}


def problem(load: tuple[int, ...], inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(sum(load) + inputs)
    n, experts = sum(load), len(load)
    shapes = (n, inputs), (experts, inputs, outputs), (n, outputs)
    end_E = torch.tensor(load).cumsum(0).to(torch.int32)
    return *(torch.randn(shape).to(DEVICE, dtype) for shape in shapes), end_E.to(DEVICE)


def split(x_NI: Tensor, end_E: Tensor) -> tuple[Tensor, ...]:
    return x_NI.tensor_split(end_E[:-1].tolist())


def loop_rows(x_NI: Tensor, weight_EIO: Tensor, end_E: Tensor) -> Tensor:
    return torch.cat([x @ weight for x, weight in zip(split(x_NI, end_E), weight_EIO, strict=True)])


def loop_outer(x_NI: Tensor, grad_NO: Tensor, end_E: Tensor) -> Tensor:
    return torch.stack([x.mT @ grad for x, grad in zip(split(x_NI, end_E), split(grad_NO, end_E), strict=True)])


def agrees(found: Tensor, reference, left: Tensor, right: Tensor, end_E: Tensor) -> bool:
    """Within fp32's error of the sum, by fp64, and one rounding to the dtype (the interpreter cuts bf16 off)."""
    want, size = (
        reference(left.double(), right.double(), end_E),
        reference(left.double().abs(), right.double().abs(), end_E),
    )
    bound = 4 * torch.finfo(torch.float32).eps * size + torch.finfo(found.dtype).eps * want.abs()
    return found.dtype == left.dtype and found.shape == want.shape and bool(((found - want).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_equal_to_the_loop_in_fp64(load, dtype):
    x_NI, weight_EIO, grad_NO, end_E = problem(load, 37, 70, dtype)  # multiples of nothing
    assert agrees(grouped_mm(x_NI, weight_EIO, end_E), loop_rows, x_NI, weight_EIO, end_E)
    assert agrees(grouped_mm(grad_NO, weight_EIO.mT, end_E), loop_rows, grad_NO, weight_EIO.mT, end_E)
    assert agrees(grouped_mm_wgrad(x_NI, grad_NO, end_E), loop_outer, x_NI, grad_NO, end_E)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("over", [0, 2], ids=["whole tiles", "with edges"])
def test_every_tile_gives_the_same(tile, over, monkeypatch):
    for kernel in (triton_grouped._grouped_mm, triton_grouped._grouped_mm_wgrad):
        monkeypatch.setattr(kernel, "configs", [tile])
    height, depth, width = (tile.kwargs[side] for side in ("HEIGHT", "DEPTH", "WIDTH"))
    load = (height + over, 0, depth - 1)
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16  # large tiles of fp32 do not fit every card
    x_NI, weight_EIO, grad_NO, end_E = problem(load, max(height, depth) + over, width + over, dtype)
    assert agrees(grouped_mm(x_NI, weight_EIO, end_E), loop_rows, x_NI, weight_EIO, end_E)
    assert agrees(grouped_mm_wgrad(x_NI, grad_NO, end_E), loop_outer, x_NI, grad_NO, end_E)


def test_more_tiles_than_one_band_holds():
    x_NI, weight_EIO, grad_NO, end_E = problem((33, 0, 33, 250), 20, 70, torch.float32)
    assert agrees(grouped_mm(x_NI, weight_EIO, end_E), loop_rows, x_NI, weight_EIO, end_E)
    x_NI, weight_EIO, grad_NO, end_E = problem((12, 20), 300, 70, torch.float32)
    assert agrees(grouped_mm_wgrad(x_NI, grad_NO, end_E), loop_outer, x_NI, grad_NO, end_E)


def test_an_expert_without_rows_gets_zeros_and_no_rows_at_all_give_nothing():
    x_NI, weight_EIO, grad_NO, end_E = problem((0, 9, 0), 24, 40, torch.bfloat16)
    assert grouped_mm_wgrad(x_NI, grad_NO, end_E)[::2].eq(0).all()
    none = torch.zeros_like(end_E)
    assert grouped_mm(x_NI[:0], weight_EIO, none).shape == (0, 40)
    assert grouped_mm_wgrad(x_NI[:0], grad_NO[:0], none).eq(0).all()


def test_any_strides():
    x_NI, weight_EIO, grad_NO, end_E = problem((11, 0, 30), 48, 72, torch.float32)
    sparse, turned, flat = x_NI[:, ::3], x_NI.mT.contiguous().mT, grad_NO[:1, :1].expand(41, 72)
    assert agrees(grouped_mm(sparse, weight_EIO[:, ::3], end_E), loop_rows, sparse, weight_EIO[:, ::3], end_E)
    assert agrees(grouped_mm(turned, weight_EIO, end_E), loop_rows, turned, weight_EIO, end_E)
    assert agrees(grouped_mm_wgrad(turned, flat, end_E), loop_outer, turned, flat, end_E)


def test_nothing_leaks_from_one_expert_to_the_next():
    x_NI, weight_EIO, grad_NO, end_E = problem((20, 7, 20), 24, 40, torch.float32)
    x_NI[20:27], weight_EIO[1] = torch.nan, torch.inf
    out_NO = grouped_mm(x_NI, weight_EIO, end_E)
    assert out_NO[:20].isfinite().all() and out_NO[27:].isfinite().all() and not out_NO[20:27].isfinite().any()
    assert grouped_mm_wgrad(x_NI, grad_NO, end_E)[::2].isfinite().all()


class Linear(torch.autograd.Function):
    """As a layer of experts calls them."""

    @staticmethod
    def forward(ctx, x_NI, weight_EIO, end_E):
        ctx.save_for_backward(x_NI, weight_EIO, end_E)
        return grouped_mm(x_NI, weight_EIO, end_E)

    @staticmethod
    def backward(ctx, grad_NO):
        x_NI, weight_EIO, end_E = ctx.saved_tensors
        return grouped_mm(grad_NO, weight_EIO.mT, end_E), grouped_mm_wgrad(x_NI, grad_NO, end_E), None


def test_a_compiled_step_has_no_graph_break_and_no_second_graph_for_another_load():
    graphs = []

    def compiler(graph, _example):
        graphs.append(graph)
        return graph

    step = torch.compile(lambda x, w, end: Linear.apply(x, w, end).square().sum(), backend=compiler, fullgraph=True)
    for load in ((4, 0, 14), (0, 18, 0)):
        x_NI, weight_EIO, _, end_E = problem(load, 20, 12, torch.float32)
        leaves = x_NI.requires_grad_(), weight_EIO.requires_grad_()
        found = torch.autograd.grad(step(*leaves, end_E), leaves)
        want = torch.autograd.grad(loop_rows(*leaves, end_E).square().sum(), leaves)
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-4)
    assert len(graphs) == 1


def test_torch_knows_the_operators_by_their_shapes():
    x_NI, weight_EIO, grad_NO, end_E = problem((3, 0, 5), 16, 8, torch.float32)
    torch.library.opcheck(grouped_mm, (x_NI, weight_EIO, end_E))
    torch.library.opcheck(grouped_mm, (grad_NO, weight_EIO.mT, end_E))
    torch.library.opcheck(grouped_mm_wgrad, (x_NI, grad_NO, end_E))

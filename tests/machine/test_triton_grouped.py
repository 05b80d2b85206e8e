"""The Triton kernels without a card: their laws in triton's interpreter, and compiled for cards that are not here."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from khanhllm.machine import triton_grouped  # noqa: E402
from khanhllm.machine.backends import Problem, by_triton, fault, host_must_not_wait  # noqa: E402
from khanhllm.machine.triton_grouped import TILES  # noqa: E402

SHARED = 99 * 1024
"""shared memory of one program on SM86 and SM89, the least of the family (bytes)"""


def hold_the_laws(interpret: str) -> None:
    laws = Path(__file__).with_name("triton_laws.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(laws)]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": interpret}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]


@pytest.mark.slow
@pytest.mark.skipif(
    triton.__version__ < "3.7" and numpy.__version__ >= "2.4", reason="this triton's interpreter breaks on numpy 2.4"
)
def test_the_laws_hold_in_the_interpreter():
    hold_the_laws(interpret="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_laws_hold_on_the_card_and_the_host_does_not_wait():
    hold_the_laws(interpret="0")
    problem = Problem.tiny(torch.device("cuda"), torch.bfloat16)
    assert fault(by_triton, problem) is None  # tuned
    assert fault(by_triton, problem, host_must_not_wait) is None


def compiled(tuner, tile, capability: int, unit_strides: set[str]):
    """The kernel's machine code for bf16, whole tiles, and strides of 16 bytes but for those that are 1."""
    kernel = tuner.fn.fn
    meta = {**tile.kwargs, "LANES": 8, "PRECISION": "ieee", "WHOLE_I": True, "WHOLE_O": True}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in meta or name in unit_strides:
            signature[name], constants[place,] = "constexpr", meta.get(name, 1)
            continue
        pointer = name.rpartition("_")[2].isupper()
        signature[name] = ("*i32" if name == "end_E" else "*bf16") if pointer else "i32"
        if not parameter.do_not_specialize:
            attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("capability", [80, 89])
@pytest.mark.parametrize(
    ("tuner", "unit_strides"),
    [
        (triton_grouped._grouped_mm, {"x_i", "weight_o"}),
        (triton_grouped._grouped_mm, {"x_i", "weight_i"}),
        (triton_grouped._grouped_mm_wgrad, {"x_i", "grad_o"}),
    ],
    ids=["rows", "rows of a transposed weight", "outer"],
)
def test_it_compiles_to_tensor_core_code_that_fits(tuner, unit_strides, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tile = TILES[0] if capability == 80 else TILES[-1]
    kernel = compiled(tuner, tile, capability, unit_strides)
    assert kernel.asm["cubin"]
    assert "mma.sync" in kernel.asm["ptx"] and "fma.rn.f32" not in kernel.asm["ptx"]
    assert kernel.asm["ptx"].count("cp.async.cg") >= 2 * (tile.num_stages - 1)  # both sides come in ahead of use
    assert kernel.metadata.shared == shared(tile) <= SHARED


def shared(tile) -> int:
    """Both sides of one step, for every step that is under way (bytes)."""
    height, depth, width = (tile.kwargs[side] for side in ("HEIGHT", "DEPTH", "WIDTH"))
    return 2 * (height + width) * depth * (tile.num_stages - 1)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile_fits_the_small_cards(tile):
    assert shared(tile) <= SHARED


def tried(tuner, precision: str = "tf32", **size: int) -> list:
    return tuner.early_config_prune(TILES, size, PRECISION=precision)


def test_the_tuner_tries_no_tile_that_stands_mostly_empty():
    assert tried(triton_grouped._grouped_mm, inputs=1024, outputs=4096, share=1024) == TILES
    assert tried(triton_grouped._grouped_mm, inputs=32, outputs=48, share=16) == TILES[:1]
    low = tried(triton_grouped._grouped_mm, inputs=1024, outputs=4096, share=64)
    assert low and all(tile.kwargs["HEIGHT"] < 128 for tile in low)
    assert tried(triton_grouped._grouped_mm_wgrad, inputs=1024, outputs=4096, share=1024) == TILES
    assert len(tried(triton_grouped._grouped_mm, "ieee", inputs=1024, outputs=4096, share=1024)) < len(TILES)


def test_the_tuner_cannot_see_the_load():
    for tuner in (triton_grouped._grouped_mm, triton_grouped._grouped_mm_wgrad):
        assert not {"n", "end_E"} & set(tuner.keys)
    assert triton_grouped._share(4096, 8) == triton_grouped._share(8000, 8) < triton_grouped._share(8192, 8)


@pytest.mark.parametrize(
    ("setting", "dtype", "precision"),
    [
        ("highest", torch.float32, "ieee"),
        ("high", torch.float32, "tf32"),
        ("highest", torch.bfloat16, "tf32"),
    ],
)
def test_fp32_is_multiplied_as_torch_was_told(setting, dtype, precision):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        assert triton_grouped._precision(dtype) == precision
    finally:
        torch.set_float32_matmul_precision(before)

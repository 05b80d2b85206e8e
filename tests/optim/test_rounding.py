"""Stochastic rounding: right on average, always a neighbour, the same bits for the same step; and what it is for."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from khanhllm import optim
from khanhllm.optim import rounding
from khanhllm.schema import OptimConfig

OPTIMIZERS = pytest.mark.parametrize("name", ["adamw", "adamw8bit"])


def bits(seed=0, step=0):
    return rounding.noise({"seed": seed, "step": step, "params": [torch.empty(0)]}, 0)


def rounded(x, draw):
    weight = torch.empty_like(x, dtype=torch.bfloat16)
    rounding.store(weight, x.clone(), draw)
    return weight


def neighbours(x):
    """The bf16 numbers next to x, towards zero and away from it: from numpy's bits, not from torch."""
    towards = x.numpy().view(np.uint32) & 0xFFFF0000
    return towards.view(np.float32), (towards + 0x10000).view(np.float32)


def test_the_mean_of_many_draws_is_the_number_itself():
    x = torch.randn(200, generator=torch.Generator().manual_seed(1)) * 10.0 ** torch.arange(-20, 20).repeat(5)
    near, far = neighbours(x)
    draw, times = bits(), 4000
    found = np.stack([rounded(x, draw).float().numpy() for _ in range(times)])
    assert ((found == near) | (found == far)).all()
    wanted = (x.numpy() - near) / (far - near)
    error = (found == far).mean(0) - wanted
    assert np.abs(error / np.sqrt(wanted * (1 - wanted) / times)).max() < 5
    assert abs(error.mean()) < 5 * 0.5 / np.sqrt(times * len(x))


def test_what_bf16_can_hold_stays():
    x = torch.tensor([0.0, -0.0, 1.0, -3.5, 2.0**-126, -(2.0**127), torch.inf, -torch.inf])
    x = torch.cat([x, torch.randn(1001).bfloat16().float()])
    for step in range(20):
        assert torch.equal(rounded(x, bits(step=step)).float(), x)


def test_bits_are_a_function_of_seed_and_step():
    x = torch.randn(1000)
    assert torch.equal(rounded(x, bits(3, 7)), rounded(x, bits(3, 7)))
    for other in ((3, 8), (4, 7)):
        assert (rounded(x, bits(3, 7)) != rounded(x, bits(*other))).float().mean() > 0.1


@OPTIMIZERS
def test_an_update_too_small_for_bf16_counts_on_average(name, monkeypatch):
    """Below 1 the neighbours are 1/256 apart: AdamW's 0.001 is a quarter of that and would be rounded off each time."""

    def after(steps):
        weight = torch.nn.Parameter(torch.ones(64, 128, dtype=torch.bfloat16))
        layer = torch.nn.ParameterDict({"up": weight})
        optimizer = optim.build(layer, OptimConfig(name=name, lr=1e-3, weight_decay=0))
        for step in range(steps):
            optimizer.param_groups[0]["step"] = step
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        return weight.detach().float()

    moved = after(20)
    assert moved.mean().item() == pytest.approx(1 - 20 * 1e-3, abs=5 * 0.5 / 256 / (64 * 128 / 20) ** 0.5)
    monkeypatch.setattr(rounding, "round_stochastically_", lambda x, bits: x)  # then copy_ rounds to nearest
    assert (after(20) == 1).all()


def layer_of(dtype, gradients=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.nn.Parameter(torch.randn(67, 129, generator=generator).bfloat16().to(dtype))
    weight.grad_dtype = gradients
    layer = torch.nn.ParameterDict({"up": weight, "up_bias": torch.randn(67, generator=generator)})
    return layer, torch.randn(67, 129, generator=generator).bfloat16().to(gradients)


@OPTIMIZERS
@pytest.mark.parametrize("gradients", [torch.float32, torch.bfloat16])
def test_the_rounded_update_is_a_neighbour_of_the_exact_one(name, gradients, monkeypatch):
    """Against torch's and bitsandbytes' own classes on fp32 weights; moments agree. In many slices."""
    from bitsandbytes.optim import AdamW8bit

    reference = {"adamw": torch.optim.AdamW, "adamw8bit": AdamW8bit}[name]
    (theirs, gradient), (ours, _) = layer_of(torch.float32), layer_of(torch.bfloat16, gradients)
    exact = reference([theirs["up"]], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    rough = optim.build(ours, OptimConfig(name=name, lr=1e-2, weight_decay=0.1))
    monkeypatch.setattr(rounding, "SLICE", 512)
    for step in range(3):
        with torch.no_grad():
            theirs["up"].copy_(ours["up"])
        theirs["up"].grad, ours["up"].grad = gradient.clone(), gradient.clone().to(gradients)
        ours["up_bias"].grad = torch.ones(67)
        exact.step()
        for group in rough.param_groups:
            group["step"] = step
        rough.step()
        near, far = neighbours(theirs["up"].detach())
        found = ours["up"].detach().float().numpy()
        assert ((found == near) | (found == far)).all()
        assert (found != near).any()
        for key, value in exact.state[theirs["up"]].items():
            kept = rough.state[ours["up"]][key]
            torch.testing.assert_close(kept, value, rtol=1e-6, atol=0)


def test_slices_change_nothing_for_fp32_weights(monkeypatch):
    from bitsandbytes.optim import AdamW8bit

    (theirs, gradient), (ours, _) = layer_of(torch.float32), layer_of(torch.float32)
    whole = AdamW8bit([theirs["up"]], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    sliced = optim.build(ours, OptimConfig(name="adamw8bit", lr=1e-2, weight_decay=0.1))
    monkeypatch.setattr(rounding, "SLICE", 512)
    for step in range(1, 4):
        theirs["up"].grad, ours["up"].grad = gradient * step, gradient * step
        whole.step()
        sliced.step()
    assert torch.equal(theirs["up"], ours["up"])


class Largest(TorchDispatchMode):
    """The most bytes that a single operation made."""

    made = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not any(
            isinstance(old, torch.Tensor) and old.untyped_storage().data_ptr() == result.untyped_storage().data_ptr()
            for old in args
        ):
            self.made = max(self.made, result.nbytes)
        return result


@OPTIMIZERS
def test_no_copy_of_a_whole_parameter_is_made(name, monkeypatch):
    layer, gradient = layer_of(torch.bfloat16, torch.bfloat16)
    optimizer = optim.build(layer, OptimConfig(name=name))
    monkeypatch.setattr(rounding, "SLICE", 512)
    for _ in range(2):  # the first step makes the moments
        layer["up"].grad = gradient.clone()
        with Largest() as watch:
            optimizer.step()
    assert 0 < watch.made <= 4 * 512

"""RMSNorm as one operation, against PyTorch's own in double precision."""

import pytest
import torch
import torch.nn.functional as F

from khanhllm.model.norm import RMSNorm, rms_norm

G = torch.Generator().manual_seed(3)


def differentiated(x, weight, eps, function):
    """The answer, and the gradients of a sum in which every number counts otherwise."""
    wanted = [tensor.requires_grad_() for tensor in (x, weight) if tensor is not None]
    y = function(x, weight, eps)
    factor = torch.linspace(-1, 2, y.numel()).view_as(y).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * factor).sum(), wanted)]


@pytest.mark.parametrize("shape", [(7,), (5, 16), (2, 3, 4, 8)])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_value_and_gradients_are_those_of_pytorch_in_double_precision(shape, weighted, eps):
    x = 3 * torch.randn(shape, generator=G)
    weight = torch.randn(shape[-1], generator=G) if weighted else None
    exact = [None if tensor is None else tensor.double() for tensor in (x, weight)]
    reference = differentiated(*exact, eps, lambda x, weight, eps: F.rms_norm(x, x.shape[-1:], weight, eps))
    for ours, theirs in zip(differentiated(x, weight, eps, rms_norm), reference, strict=True):
        assert torch.allclose(ours.double(), theirs, atol=1e-6, rtol=1e-5)


def test_a_vector_of_zeros_stays_one_and_has_a_gradient():
    x = torch.zeros(2, 4, requires_grad=True)
    y = RMSNorm(4, eps=1e-4)(x)
    y.sum().backward()
    assert not y.any()
    assert torch.allclose(x.grad, torch.full((2, 4), 100.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_are_left_to_pytorch(dtype):
    x = torch.randn(3, 8, generator=G).to(dtype).requires_grad_()
    norm = RMSNorm(8, eps=1e-5).to(dtype)
    assert torch.equal(norm(x), F.rms_norm(x, (8,), norm.weight, 1e-5))


def test_autocast_does_not_round_it():
    x = torch.randn(64, 128, generator=G)
    with torch.autocast("cpu", torch.bfloat16):
        y, gradient = differentiated(x, None, 1e-5, rms_norm)
    exact, exact_gradient = differentiated(x.double(), None, 1e-5, lambda x, _, eps: F.rms_norm(x, (128,), eps=eps))
    assert torch.allclose(y.double(), exact, atol=1e-6)
    assert torch.allclose(gradient.double(), exact_gradient, atol=1e-5)


def test_no_second_derivative():
    x = torch.randn(3, 8, generator=G).requires_grad_()
    (gradient,) = torch.autograd.grad(rms_norm(x, None, 1e-5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()

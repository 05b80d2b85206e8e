import pytest
import torch
import torch.nn.functional as F

from khanhllm.model import losses

G = torch.Generator().manual_seed(2)


@pytest.mark.parametrize("chunk", [1, 7, 37, 64])
def test_chunked_loss_and_gradients_equal_the_whole(chunk):
    x, weight = (torch.randn(n, 16, generator=G, dtype=torch.float64, requires_grad=True) for n in (37, 50))
    targets = torch.randint(50, (37,), generator=G)
    theirs_T = F.cross_entropy(x @ weight.T, targets, reduction="none")
    for upstream in (torch.full((), 1 / 3, dtype=torch.float64).expand(37), torch.randn(37, generator=G).double()):
        theirs = torch.autograd.grad((theirs_T * upstream).sum(), (x, weight), retain_graph=True)
        nll_T = losses.token_nll(x, weight, targets, chunk)
        ours = torch.autograd.grad(nll_T, (x, weight), upstream)
        assert torch.allclose(nll_T, theirs_T, atol=1e-12)
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(ours, theirs, strict=True))
    with torch.no_grad():
        assert torch.allclose(losses.token_nll(x, weight, targets, chunk), theirs_T, atol=1e-12)


def test_the_share_of_a_step_is_that_of_its_counted_targets():
    nll = torch.rand(4, 8, generator=G)
    nll[1:] = 0
    prob, z, load = torch.rand(2, 3), torch.rand(2), torch.rand(2, 3)
    weights = (32, 0.1, 0.1)
    all_of_it = losses.share_of_step(torch.zeros(1), prob, z, load, *weights)
    assert torch.allclose(losses.share_of_step(nll, prob, z, load, *weights, counted=8), nll[0].mean() + all_of_it)
    assert torch.equal(losses.share_of_step(torch.zeros(1), prob, z, load, *weights, counted=0), all_of_it)


@pytest.mark.parametrize(
    ("upstream", "times"),
    [(torch.ones(()).expand(100), 1), (torch.rand(100, generator=G), 2)],
    ids=["one number for all", "a number for each"],
)
def test_rows_of_logits_exist_by_the_chunk_and_are_made_once(upstream, times, monkeypatch):
    rows = []
    honest = losses._nll
    monkeypatch.setattr(losses, "_nll", lambda x, *rest: rows.append(len(x)) or honest(x, *rest))
    x = torch.randn(100, 8, requires_grad=True)
    losses.token_nll(x, torch.randn(20, 8), torch.zeros(100, dtype=torch.long), 16).backward(upstream)
    assert max(rows) == 16
    assert sum(rows) == 100 * times


def test_the_gradient_of_a_step_asks_for_one_number():
    """The road through `share_of_step` and the head's view must reach the cheap backward pass."""
    nll, prob, z = torch.rand(4, 8, generator=G), torch.rand(2, 3), torch.rand(2)
    seen = []
    flat = nll.flatten().requires_grad_()
    flat.register_hook(lambda grad: seen.append(grad.stride()))
    losses.share_of_step(flat.view(4, 8), prob, z, torch.rand(2, 3), 32, 0.1, 0.1).backward()
    assert seen == [(0,)]


def test_the_gradient_can_be_asked_for_twice():
    x, weight = (torch.randn(n, 8, generator=G, requires_grad=True) for n in (10, 20))
    total = losses.token_nll(x, weight, torch.arange(10), 4).sum()
    first, second = (torch.autograd.grad(3 * total, (x, weight), retain_graph=True) for _ in range(2))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(first, second, strict=True))


def test_a_second_derivative_is_refused_not_wrong():
    """Autograd cannot look into the custom backward pass: beside another term, its part would be missing in silence."""
    x, weight = (torch.randn(n, 8, generator=G, requires_grad=True) for n in (10, 20))
    total = losses.token_nll(x, weight, torch.arange(10), 4).sum() + x.pow(3).sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(total, x, create_graph=True)


def test_the_gradient_of_the_head_is_summed_in_fp32_under_autocast():
    """64 equal chunks give exactly 64 times the gradient of one: a sum kept in bf16 would be rounded on the way."""
    x, weight = torch.randn(8, 16, generator=G), torch.randn(20, 16, generator=G)
    targets = torch.randint(20, (8,), generator=G)

    def gradient(times):
        leaf = weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            nll = losses.token_nll(x.repeat(times, 1), leaf, targets.repeat(times), 8)
        nll.sum().backward()
        return leaf.grad

    assert torch.equal(gradient(64), 64 * gradient(1))


def test_even_routing_scores_one_and_collapse_scores_experts():
    even, collapsed = torch.ones(1, 8), torch.eye(8)[:1]
    assert losses.load_balance(even, even).item() == 1
    assert losses.load_balance(collapsed, collapsed).item() == 8


def test_balance_is_per_layer():
    """Opposite collapses in two layers must not cancel."""
    assert losses.load_balance(torch.eye(2), torch.eye(2)).tolist() == [2, 2]


def test_shares_add_up():
    nll, prob, z = (torch.rand(*shape, generator=G) for shape in ((8, 4), (2, 3), (2,)))
    load = torch.rand(2, 3, generator=G).softmax(-1)
    whole = losses.share_of_step(nll, prob, z, load, 32, 0.1, 0.01)
    half = [losses.share_of_step(part, prob / 2, z / 2, load, 32, 0.1, 0.01) for part in nll.split(4)]
    assert torch.allclose(sum(half), whole)

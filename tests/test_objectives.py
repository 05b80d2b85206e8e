import torch
import torch.nn.functional as F

from khanhllm import objectives

G = torch.Generator().manual_seed(2)


def test_chunked_loss_and_gradients_equal_the_whole():
    x, weight = (torch.randn(n, 16, generator=G, dtype=torch.float64, requires_grad=True) for n in (37, 50))
    targets = torch.randint(50, (37,), generator=G)
    upstream = torch.randn(37, generator=G)
    whole = F.cross_entropy(x @ weight.T, targets, reduction="none")
    theirs = torch.autograd.grad((whole * upstream).sum(), (x, weight))
    for chunk in (1, 10, 37, 100):
        nll = objectives.token_nll(x, weight, targets, chunk)
        ours = torch.autograd.grad((nll * upstream).sum(), (x, weight))
        assert torch.allclose(nll.double(), whole, atol=1e-5)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_the_whole_matrix_of_logits_never_exists(monkeypatch):
    rows = []
    honest = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w: rows.append(len(x)) or honest(x, w))
    x = torch.randn(100, 8, requires_grad=True)
    objectives.token_nll(x, torch.randn(20, 8), torch.zeros(100, dtype=torch.long), 16).sum().backward()
    assert max(rows) == 16
    assert sum(rows) == 200  # forward, and once more for the backward pass


def test_even_routing_scores_one_and_collapse_scores_experts():
    even, collapsed = torch.ones(1, 8), torch.eye(8)[:1]
    assert objectives.load_balance(even, even).item() == 1
    assert objectives.load_balance(collapsed, collapsed).item() == 8


def test_balance_is_per_layer():
    """Opposite collapses in two layers must not cancel."""
    assert objectives.load_balance(torch.eye(2), torch.eye(2)).tolist() == [2, 2]


def test_shares_add_up():
    nll, prob, z = (torch.rand(*shape, generator=G) for shape in ((8, 4), (2, 3), (2,)))
    load = torch.rand(2, 3, generator=G).softmax(-1)
    whole = objectives.share_of_step(nll, prob, z, load, 32, 0.1, 0.01)
    half = [objectives.share_of_step(part, prob / 2, z / 2, load, 32, 0.1, 0.01) for part in nll.split(4)]
    assert torch.allclose(sum(half), whole)

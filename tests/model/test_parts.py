"""The parts of the model against their definitions, written out plainly, in fp64 where it exists."""

import math

import pytest
import torch
import torch.nn.functional as F

from conftest import build, tiny
from khanhllm.errors import UserError
from khanhllm.model.embedding import TokenEmbedding
from khanhllm.model.experts import GROUPED, LOOP, GeluExperts, Relu2Experts, SwiGLUExperts
from khanhllm.model.rope import Rope
from khanhllm.model.router import Choice, move_biases

G = torch.Generator().manual_seed(5)


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order():
    G.manual_seed(5)


def one_expert(experts, index, x):
    if isinstance(experts, GeluExperts):
        hidden = F.gelu(x @ experts.up[index] + experts.up_bias[index])
        return hidden @ experts.down[index] + experts.down_bias[index]
    if isinstance(experts, Relu2Experts):
        return F.relu(x @ experts.up[index]) ** 2 @ experts.down[index]
    return (F.silu(x @ experts.gate[index]) * (x @ experts.up[index])) @ experts.down[index]


@pytest.mark.parametrize("style", [{"style": "classic"}, {"style": "modern"}, {"feedforward": "relu2"}])
@pytest.mark.parametrize("backend", [LOOP, GROUPED])
def test_mixture_is_the_weighted_sum_of_the_chosen_experts(style, backend):
    dtype = torch.float64 if backend is LOOP else torch.float32  # grouped_mm knows no fp64
    mixture = build(tiny(**style)).blocks[1].feedforward.to(dtype)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.normal_(0, 0.5, generator=G)  # biases too
    mixture.experts.backend = backend
    x = torch.randn(2, 9, 32, generator=G, dtype=dtype, requires_grad=True)
    y, (routing,) = mixture(x)
    flat = x.flatten(0, 1)
    weight, expert = (flat.float() @ mixture.router.weight.float().T).softmax(-1).topk(2)
    weight = weight / weight.sum(-1, keepdim=True)
    plain = torch.stack(
        [
            sum(weight[t, k] * one_expert(mixture.experts, expert[t, k], flat[t]) for k in range(2))
            for t in range(len(flat))
        ]
    )
    assert torch.allclose(y.flatten(0, 1), plain, atol=1e-6 * plain.abs().max().item())
    assert routing.load_E.sum() == 2 * len(flat)  # nothing dropped, nothing twice
    target = torch.randn(y.shape, generator=G, dtype=dtype)
    ours = torch.autograd.grad((y * target).sum(), [x, *mixture.parameters()], retain_graph=True)
    theirs = torch.autograd.grad((plain.view_as(y) * target).sum(), [x, *mixture.parameters()])
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", [LOOP, GROUPED])
@pytest.mark.parametrize("counts", [[0, 0, 0, 12], [12, 0, 0, 0], [3, 0, 9, 0], [3, 3, 3, 3]])
def test_experts_without_rows(backend, counts):
    experts = SwiGLUExperts(4, 8, 16)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0, 1, generator=G)
    experts.backend = backend
    x = torch.randn(12, 8, generator=G)
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))[torch.randperm(12, generator=G)]
    plain = torch.stack([one_expert(experts, owner[row], x[row]) for row in range(12)])
    ours = experts(x, Choice(owner[:, None], torch.ones(12, 1)), torch.tensor(counts))
    assert torch.allclose(ours, plain, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(experts(x, Choice(owner[:, None], torch.ones(12, 1)), torch.tensor(counts)), ours)
        none = experts(x[:0], Choice(owner[:0, None], torch.ones(0, 1)), torch.zeros(4))
        assert none.shape == (0, 8)
    gradients = [torch.autograd.grad(y.square().sum(), experts.parameters()) for y in (ours, plain)]
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-2) for a, b in zip(*gradients, strict=True))


@pytest.mark.filterwarnings("error:An output with one or more elements was resized")
@pytest.mark.parametrize("kind", [GeluExperts, SwiGLUExperts, Relu2Experts])
def test_uneven_experts_fit_into_the_room_that_was_taken_for_them(kind):
    experts = kind(3, 16, 8)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0, 1, generator=G)
    owner = torch.tensor([0] + [1] * 20 + [2] * 3)
    x = torch.randn(24, 16, generator=G, requires_grad=True)
    experts(x, Choice(owner[:, None], torch.ones(24, 1)), torch.bincount(owner)).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("kind", [SwiGLUExperts, Relu2Experts])
def test_a_weight_of_zero_leaves_no_gradient_and_no_nan(kind):
    """The loop divides by weights. One of exactly zero, too small for a float, learns nothing, as its probability's
    gradient is zero too."""
    experts = kind(2, 8, 16)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0, 1, generator=G)
    x = torch.randn(6, 8, generator=G, requires_grad=True)
    weight = torch.tensor([[1.0, 0.0]]).repeat(6, 1).requires_grad_()
    expert = torch.tensor([[0, 1]]).repeat(6, 1)
    experts(x, Choice(expert, weight), torch.tensor([6, 6])).sum().backward()
    assert torch.equal(weight.grad[:, 1], torch.zeros(6))
    assert x.grad.isfinite().all() and weight.grad[:, 0].abs().min() > 0


def test_a_second_derivative_of_experts_is_refused_not_wrong():
    mixture = build(tiny()).blocks[1].feedforward
    x = torch.randn(1, 9, 32, generator=G, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(mixture(x)[0].sum() + x.pow(3).sum(), x, create_graph=True)


def test_a_second_derivative_of_relu_squared_is_refused_not_wrong():
    dense = build(tiny(feedforward="relu2")).blocks[0].feedforward
    x = torch.randn(1, 9, 32, generator=G, requires_grad=True)
    (slope,) = torch.autograd.grad(dense(x)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_attention_is_softmax_of_scaled_products_over_the_past():
    attention = build(tiny("classic")).blocks[0].attention.double()
    x = torch.randn(2, 7, 32, generator=G, dtype=torch.float64)
    query, key, value = (
        linear(x).view(2, 7, 4, 8).transpose(1, 2) for linear in (attention.query, attention.key, attention.value)
    )
    scores = query @ key.mT / math.sqrt(8)
    scores = scores.masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -torch.inf)
    plain = attention.out((scores.softmax(-1) @ value).transpose(1, 2).reshape(2, 7, 32))
    assert torch.allclose(attention(x), plain, atol=1e-12)


def test_rotation_depends_on_distance_alone():
    rope = Rope(8, 64, 10_000.0)
    query, key = torch.randn(1, 1, 1, 8, generator=G), torch.randn(1, 1, 1, 8, generator=G)
    product = [(rope(query, start + 5) * rope(key, start)).sum() for start in (0, 3, 40)]
    assert torch.allclose(torch.stack(product), product[0].expand(3), atol=1e-5)
    assert not torch.allclose((rope(query, 6) * rope(key, 0)).sum(), product[0], atol=1e-3)


def test_router_weights_sum_to_one_and_come_best_first():
    router = build(tiny()).blocks[1].feedforward.router
    choice, routing = router(torch.randn(50, 32, generator=G))
    assert torch.allclose(choice.weight_TK.sum(-1), torch.ones(50))
    assert (choice.weight_TK[:, 0] >= choice.weight_TK[:, 1]).all()
    assert torch.allclose(routing.prob_E.sum(), torch.tensor(50.0))
    assert routing.load_E.tolist() == torch.bincount(choice.expert_TK.flatten(), minlength=4).tolist()


@pytest.mark.parametrize("more", [{}, {"router_bias": True}, {"style": "classic"}], ids=str)
def test_the_loss_of_the_tokens_alone_moves_the_router_whatever_the_number_of_experts(more):
    """With one expert per token, a weight that is renormalised is 1, and the router learns nothing from the loss."""
    ids = torch.randint(300, (4, 33), generator=torch.Generator().manual_seed(0))
    lengths = []
    for per_token in (1, 2):
        model = build(tiny(experts_per_token=per_token, **more))
        model(ids[:, :-1], ids[:, 1:])[0].mean().backward()
        lengths.append(model.blocks[1].feedforward.router.weight.grad.norm().item())
    assert lengths[0] > 1e-4 * lengths[1] > 0


def test_a_single_expert_s_weight_is_its_probability():
    router = build(tiny(experts_per_token=1)).blocks[1].feedforward.router
    x = torch.randn(50, 32, generator=G)
    best = (x @ router.weight.T).softmax(-1).max(-1)
    choice, _ = router(x)
    assert torch.allclose(choice.weight_TK, best.values[:, None])
    assert torch.equal(choice.expert_TK, best.indices[:, None])


def test_bf16_autocast_leaves_the_router_in_fp32():
    model = build(tiny())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        choice, routing = model.blocks[1].feedforward.router(torch.randn(5, 32).bfloat16())
    assert {choice.weight_TK.dtype, routing.prob_E.dtype, routing.z.dtype} == {torch.float32}


@pytest.mark.parametrize("backend", [LOOP, GROUPED])
def test_bf16_autocast_is_near_fp32_on_both_roads(backend):
    model = build(tiny("classic"))
    model.blocks[1].feedforward.experts.backend = backend
    ids = torch.randint(300, (2, 33), generator=G)
    exact = model(ids[:, :-1], ids[:, 1:])[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = model(ids[:, :-1], ids[:, 1:])[0]
    near.mean().backward()
    assert near.dtype == torch.float32
    assert (near - exact).abs().max() < 0.1


@pytest.mark.parametrize("kind", [SwiGLUExperts, Relu2Experts])
def test_the_gradient_of_the_router_s_weights_is_summed_in_fp32_under_autocast(kind):
    """The sum over features is not rounded to bf16 at its end: it would be equal to its own rounding."""
    experts = kind(4, 16, 64)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0, 0.5, generator=G)
    weight = torch.full((40, 2), 0.5, requires_grad=True)
    expert = torch.rand(40, 4, generator=G).topk(2).indices
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = experts(
            torch.randn(40, 16, generator=G), Choice(expert, weight), torch.bincount(expert.flatten(), minlength=4)
        )
    y.float().square().sum().backward()
    assert (weight.grad.bfloat16().float() != weight.grad).float().mean() > 0.5


@pytest.mark.parametrize("style", ["classic", "modern"])
def test_the_weights_begin_as_the_docstring_says(style):
    model = build(tiny(style, dim=256, hidden=256, expert_hidden=256, vocab_size=1000, pattern="DMDM"))
    sigma = 0.64 / 256**0.5
    expected = {
        "head.weight": sigma / 2,
        "out.weight": sigma / 8**0.5,
        "down.weight": sigma / 8**0.5,
        "query.weight": sigma,
    }
    for name, parameter in model.named_parameters():
        for ending, deviation in expected.items():
            if name.endswith(ending):
                assert parameter.std().item() == pytest.approx(deviation, rel=0.05), name


def test_the_square_of_relu():
    dense = build(tiny(feedforward="relu2")).blocks[0].feedforward.double()
    x = torch.randn(2, 9, 32, generator=G, dtype=torch.float64, requires_grad=True)
    plain = (x @ dense.up.weight.T).clamp(min=0) ** 2 @ dense.down.weight.T
    assert torch.allclose(dense(x)[0], plain, atol=1e-12)
    gradients = [torch.autograd.grad(y.exp().sum(), [x, *dense.parameters()]) for y in (dense(x)[0], plain)]
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(("every", "layers"), [(1, "01234"), (2, "024"), (3, "14"), (9, "4")])
def test_value_embeddings_stand_in_one_of_so_many_layers(every, layers):
    model = build(tiny(value_embedding=True, value_every=every, pattern="DDDDD"))
    assert list(model.value_embedding.tables) == list(layers)


def test_value_embeddings_begin_as_nothing_and_stand_in_every_other_layer():
    with_tables, plain = build(tiny(value_embedding=True, pattern="DMD")), build(tiny(pattern="DMD"))
    assert list(with_tables.value_embedding.tables) == ["0", "2"]
    ids = torch.arange(20).view(2, 10)
    assert torch.equal(with_tables(ids, ids)[0], plain(ids, ids)[0])
    with torch.no_grad():
        with_tables.value_embedding.tables["2"].weight.normal_(generator=G)
    other = with_tables(ids, ids)[0]
    assert not torch.equal(other, plain(ids, ids)[0])
    cache = with_tables.new_cache(2)
    stepwise = [with_tables.logits(ids[:, t : t + 1], cache) for t in range(10)]
    assert torch.allclose(torch.cat(stepwise, 1), with_tables.logits(ids), atol=1e-5)


def test_a_pair_begins_as_nothing_and_gives_its_second_token_a_vector_of_its_own():
    with_pairs, plain = build(tiny(pair_embedding=500)), build(tiny())
    ids = torch.tensor([[5, 7, 9, 5, 7], [7, 5, 9, 7, 7]])
    assert torch.equal(with_pairs(ids, ids)[0], plain(ids, ids)[0])
    with torch.no_grad():
        with_pairs.embedding.pair.weight.normal_(generator=G)
    added = with_pairs.embedding(ids) - with_pairs.embedding.token(ids)
    assert torch.allclose(added[0, 1], added[0, 4], atol=1e-6)  # 5 7 again
    assert not torch.allclose(added[0, 1], added[1, 4], atol=1e-2)  # 7 7
    cache = with_pairs.new_cache(2)
    stepwise = [with_pairs.logits(ids[:, t : t + 1], cache) for t in range(5)]
    assert torch.allclose(torch.cat(stepwise, 1), with_pairs.logits(ids), atol=1e-5)


def test_the_length_of_a_normed_token_says_nothing():
    model, ids = build(tiny(token_norm=True, norm_eps=1e-9)), torch.tensor([[5, 7, 7, 9]])
    with torch.no_grad():
        before = model.logits(ids)
        model.embedding.token.weight[7] *= 30
        assert torch.allclose(model.logits(ids), before, atol=1e-5)
        assert torch.allclose(model.embedding(ids).square().mean(-1), torch.ones(1, 4))


def test_pairs_are_spread_evenly_over_their_table():
    embedding = TokenEmbedding(300, 1, 1000)
    with torch.no_grad():
        embedding.pair.weight.copy_(torch.arange(1000.0)[:, None])
        embedding.token.weight.zero_()
    every = torch.cartesian_prod(torch.arange(300), torch.arange(300))
    places = embedding(every)[:, 1, 0].long().bincount(minlength=1000)
    assert places.float().std() < 1.5 * 90**0.5  # 90 pairs a place, as chance would spread them


def test_a_skip_begins_as_nothing_and_brings_the_embedding_to_each_layer():
    with_skip, plain = build(tiny(embedding_skip=True)), build(tiny())
    ids = torch.arange(20).view(2, 10)
    assert torch.equal(with_skip(ids, ids)[0], plain(ids, ids)[0])
    with torch.no_grad():
        with_skip.embedding_skip.stream_L.fill_(-1)
        with_skip.embedding_skip.embedding_L.copy_(torch.tensor([0.0, 2.0]))
    last = with_skip.blocks[-1](2 * with_skip.embedding(ids))[0]
    assert torch.allclose(with_skip.trunk(ids)[0], last, atol=1e-6)


def test_a_scaled_stream_begins_as_it_was_and_is_scaled_before_each_layer():
    scaled, plain = build(tiny(stream_scale=True)), build(tiny())
    ids = torch.arange(20).view(2, 10)
    assert torch.equal(scaled(ids, ids)[0], plain(ids, ids)[0])
    with torch.no_grad():
        scaled.embedding_skip.stream_L.copy_(torch.tensor([1.0, -0.5]))
    first = scaled.blocks[0](2 * scaled.embedding(ids))[0]
    assert torch.allclose(scaled.trunk(ids)[0], scaled.blocks[1](0.5 * first)[0], atol=1e-6)


def test_a_shift_begins_as_nothing_and_adds_the_position_before_to_the_input_of_each_layer():
    shifted, plain = build(tiny(token_shift=True)), build(tiny())
    ids = torch.tensor([[5, 7, 9, 5, 7], [7, 5, 9, 7, 7]])
    assert torch.equal(shifted(ids, ids)[0], plain(ids, ids)[0])
    shift_LD = torch.randn(2, 32, generator=G)
    with torch.no_grad():
        shifted.token_shift.shift_LD.copy_(shift_LD)
        x = plain.embedding(ids)
        for shift_D, block in zip(shift_LD, plain.blocks, strict=True):
            normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            x = block(x + shift_D * torch.stack([normed[:, max(t - 1, 0)] for t in range(5)], dim=1))[0]
        assert torch.allclose(shifted.trunk(ids)[0], x, atol=1e-5)


@pytest.mark.parametrize("key", ["value_embedding", "token_norm", "token_shift", "stream_scale", "embedding_skip"])
def test_a_classic_model_has_no_part_of_a_modern_one(key):
    with pytest.raises(UserError, match=rf"choices of style modern: {key}$"):
        tiny("classic", **{key: True})


def test_with_zero_out_every_layer_begins_as_nothing():
    model = build(tiny(zero_out=True))
    ids = torch.arange(20).view(2, 10)
    assert torch.equal(model.trunk(ids)[0], model.embedding(ids))


def test_tokens_look_different_to_every_classic_router_from_the_start():
    model = build(tiny("classic", pattern="DM" * 7, dim=64))
    shares = []

    def share_of_the_mean(module, inputs):
        x = inputs[0].flatten(0, -2)
        shares.append((x.mean(0).square().sum() / x.square().sum(-1).mean()).item())

    for block in model.blocks[1::2]:
        block.feedforward.router.register_forward_pre_hook(share_of_the_mean)
    model.trunk(torch.randint(300, (8, 32), generator=G))
    assert len(shares) == 7
    assert max(shares) < 0.05


def test_a_biased_router_chooses_otherwise_and_weighs_the_same():
    mixture = build(tiny(router_bias=True)).blocks[1].feedforward
    x = torch.randn(50, 32, generator=G)
    plain, _ = mixture.router(x)
    mixture.router.bias_E[3] = 1.0  # more than any probability
    choice, routing = mixture.router(x)
    assert (choice.expert_TK == 3).any(dim=-1).all()
    assert routing.load_E[3] == 50
    same = (choice.expert_TK == plain.expert_TK).all(dim=-1)
    assert same.any() and torch.allclose(choice.weight_TK[same], plain.weight_TK[same])
    assert torch.allclose(choice.weight_TK.sum(-1), torch.ones(50))


def test_biases_move_against_the_load():
    model = build(tiny(router_bias=True))
    move_biases(model, torch.tensor([[40.0, 0, 10, 10]]), 0.01)
    assert model.blocks[1].feedforward.router.bias_E.tolist() == pytest.approx([-0.01, 0.01, 0.01, 0.01])

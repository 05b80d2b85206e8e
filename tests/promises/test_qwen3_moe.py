"""The modern model is Qwen3-MoE: with the same weights, transformers computes the same logits."""

import pytest
import torch

from conftest import build, tiny
from khanhllm.errors import UserError
from khanhllm.export import qwen3_moe

transformers = pytest.importorskip("transformers")


def as_qwen3_moe(model):
    """transformers' model with the same weights."""
    settings = qwen3_moe.settings(model.config)
    theirs = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**settings, attn_implementation="sdpa"))
    theirs.load_state_dict(qwen3_moe.tensors(model), strict=True)
    return theirs.eval()


@pytest.mark.parametrize("pattern", ["DMDM", "MDDM"])
@pytest.mark.parametrize("kv_heads", [0, 2])
def test_logits_equal_those_of_transformers(kv_heads, pattern):
    model = build(tiny(pattern=pattern, kv_heads=kv_heads))
    ids = torch.randint(300, (3, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model.logits(ids), as_qwen3_moe(model)(ids).logits
    assert (ours - theirs).abs().max() < 1e-4
    assert ours.std() > 0.05  # not equal because both are nothing


def test_one_expert_per_token_is_theirs_without_renormalising():
    model = build(tiny(pattern="DMDM", experts_per_token=1))
    with torch.no_grad():  # wide enough that the experts' weight is seen
        for block in model.blocks[1::2]:
            block.feedforward.experts.down.mul_(20)
    ids = torch.randint(300, (3, 32), generator=torch.Generator().manual_seed(1))
    assert not qwen3_moe.settings(model.config)["norm_topk_prob"]
    with torch.no_grad():
        assert (model.logits(ids) - as_qwen3_moe(model)(ids).logits).abs().max() < 1e-4


def test_one_wrong_weight_is_seen():
    model = build(tiny(pattern="DMDM"))
    theirs = as_qwen3_moe(model)
    ids = torch.randint(300, (3, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.blocks[1].feedforward.experts.up[0].mul_(1.5)
        assert (model.logits(ids) - theirs(ids).logits).abs().max() > 1e-4


@pytest.mark.parametrize(
    "shape",
    [
        {"style": "classic"},
        {"feedforward": "relu2"},
        {"value_embedding": True},
        {"pair_embedding": 64},
        {"embedding_skip": True},
        {"router_bias": True},
    ],
    ids=lambda shape: next(iter(shape)),
)
def test_a_shape_that_they_do_not_have_is_refused_by_name(shape):
    ((key, value),) = shape.items()
    with pytest.raises(UserError, match=rf"model\.{key} {value} is unknown to Qwen3-MoE"):
        qwen3_moe.settings(tiny(**shape).model)

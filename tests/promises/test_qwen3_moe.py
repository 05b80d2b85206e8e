"""The modern model is Qwen3-MoE: with the same weights, transformers computes the same logits."""

import pytest
import torch

from conftest import build, tiny

transformers = pytest.importorskip("transformers")


def as_qwen3_moe(model):
    """The same weights under the names and in the layout of transformers."""
    config = model.config
    theirs = transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.hidden,
            moe_intermediate_size=config.expert_width,
            num_hidden_layers=len(config.pattern),
            num_attention_heads=config.heads,
            num_key_value_heads=config.key_value_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.context,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            num_experts=config.experts,
            num_experts_per_tok=config.experts_per_token,
            norm_topk_prob=True,
            decoder_sparse_step=2,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
    )
    weights = {
        "model.embed_tokens.weight": model.embedding.token.weight,
        "model.norm.weight": model.head.norm.weight,
        "lm_head.weight": model.head.weight,
    }
    for layer, block in enumerate(model.blocks):
        to = f"model.layers.{layer}"
        weights[f"{to}.input_layernorm.weight"] = block.attention_norm.weight
        weights[f"{to}.post_attention_layernorm.weight"] = block.feedforward_norm.weight
        for ours, name in {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}.items():
            weights[f"{to}.self_attn.{name}.weight"] = getattr(block.attention, ours).weight
        weights[f"{to}.self_attn.q_norm.weight"] = block.attention.query_norm.weight
        weights[f"{to}.self_attn.k_norm.weight"] = block.attention.key_norm.weight
        if config.pattern[layer] == "D":
            for part in ("gate", "up", "down"):
                weights[f"{to}.mlp.{part}_proj.weight"] = getattr(block.feedforward, part).weight
        else:
            experts = block.feedforward.experts
            weights[f"{to}.mlp.gate.weight"] = block.feedforward.router.weight
            weights[f"{to}.mlp.experts.gate_up_proj"] = torch.cat((experts.gate, experts.up), dim=2).mT
            weights[f"{to}.mlp.experts.down_proj"] = experts.down.mT
    theirs.load_state_dict({name: weight.detach().contiguous() for name, weight in weights.items()}, strict=True)
    return theirs.eval()


@pytest.mark.parametrize("kv_heads", [0, 2])
def test_logits_equal_those_of_transformers(kv_heads):
    model = build(tiny(pattern="DMDM", kv_heads=kv_heads))
    ids = torch.randint(300, (3, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model.logits(ids), as_qwen3_moe(model)(ids).logits
    assert (ours - theirs).abs().max() < 1e-4
    assert ours.std() > 0.05  # not equal because both are nothing


def test_one_wrong_weight_is_seen():
    model = build(tiny(pattern="DMDM"))
    theirs = as_qwen3_moe(model)
    ids = torch.randint(300, (3, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.blocks[1].feedforward.experts.up[0].mul_(1.5)
        assert (model.logits(ids) - theirs(ids).logits).abs().max() > 1e-4

"""The modern model as transformers' Qwen3-MoE: which setting, and which tensor, is which."""

from typing import Any

import torch
from torch import Tensor

from khanhllm.errors import UserError
from khanhllm.model import Transformer
from khanhllm.schema import ModelConfig

ONLY = {
    "style": "modern",
    "feedforward": "swiglu",
    "value_embedding": False,
    "pair_embedding": 0,
    "embedding_skip": False,
    "router_bias": False,
}
"""all that Qwen3-MoE knows of these keys of [model]"""
ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}


def settings(model: ModelConfig) -> dict[str, Any]:
    """The arguments of transformers' Qwen3MoeConfig. UserError, naming the key, for a shape that it cannot have."""
    for key, theirs in ONLY.items():
        if getattr(model, key) != theirs:
            raise UserError(f"model.{key} {getattr(model, key)} is unknown to Qwen3-MoE, which has only {theirs}")
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "intermediate_size": model.hidden,
        "moe_intermediate_size": model.expert_width,
        "num_hidden_layers": len(model.pattern),
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.key_value_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.context,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "num_experts": model.experts,
        "num_experts_per_tok": model.experts_per_token,
        "norm_topk_prob": model.experts_per_token > 1,  # see Router
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, letter in enumerate(model.pattern) if letter == "D"],
        "tie_word_embeddings": False,
    }


def tensors(model: Transformer) -> dict[str, Tensor]:
    """Our weights under their names and in their layout: transformers keeps the experts of a layer stacked, gate above
    up, and each matrix as (out, in)."""
    ours = {name: weight.detach() for name, weight in model.named_parameters()}
    found = {
        "model.embed_tokens.weight": ours["embedding.token.weight"],
        "model.norm.weight": ours["head.norm.weight"],
        "lm_head.weight": ours["head.weight"],
    }
    for layer, letter in enumerate(model.config.pattern):
        block, to = f"blocks.{layer}", f"model.layers.{layer}"
        found[f"{to}.input_layernorm.weight"] = ours[f"{block}.attention_norm.weight"]
        found[f"{to}.post_attention_layernorm.weight"] = ours[f"{block}.feedforward_norm.weight"]
        for part, theirs in ATTENTION.items():
            found[f"{to}.self_attn.{theirs}.weight"] = ours[f"{block}.attention.{part}.weight"]
        for part, theirs in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
            found[f"{to}.self_attn.{theirs}.weight"] = ours[f"{block}.attention.{part}.weight"]
        if letter == "D":
            for part in ("gate", "up", "down"):
                found[f"{to}.mlp.{part}_proj.weight"] = ours[f"{block}.feedforward.{part}.weight"]
        else:
            gate, up, down = (ours[f"{block}.feedforward.experts.{part}"] for part in ("gate", "up", "down"))
            found[f"{to}.mlp.gate.weight"] = ours[f"{block}.feedforward.router.weight"]
            found[f"{to}.mlp.experts.gate_up_proj"] = torch.cat((gate, up), dim=2).mT
            found[f"{to}.mlp.experts.down_proj"] = down.mT
    return {name: tensor.contiguous() for name, tensor in found.items()}

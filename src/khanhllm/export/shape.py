"""Which of our shapes another architecture can hold, and what it calls the settings."""

from typing import Any

from khanhllm.errors import UserError
from khanhllm.schema import ModelConfig

OWN = {"style": "modern", "value_embedding": False, "pair_embedding": 0, "embedding_skip": False}
"""keys of [model] for which no other architecture knows another value"""


def check_stock(model: ModelConfig, target: str, remedy: str, router_bias: bool) -> None:
    """UserError, naming the key and the remedy, for a model that no architecture of `target` can hold.

    router_bias: whether it knows biased routers.
    """
    wanted = OWN if router_bias or not model.moe_layers else OWN | {"router_bias": False}
    for key, theirs in wanted.items():
        if getattr(model, key) != theirs:
            what = f"model.{key} is {str(getattr(model, key)).lower()}"
            raise UserError(f"{what}, which {target} cannot express (it knows only {str(theirs).lower()}); {remedy}")


def qwen3(model: ModelConfig) -> dict[str, Any]:
    """The arguments of transformers' Qwen3MoeConfig, or of Qwen3Config where no layer is a mixture."""
    settings = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "intermediate_size": model.hidden,
        "num_hidden_layers": len(model.pattern),
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.key_value_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.context,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "tie_word_embeddings": False,
    }
    if not model.moe_layers:
        return settings
    return settings | {
        "moe_intermediate_size": model.expert_width,
        "num_experts": model.experts,
        "num_experts_per_tok": model.experts_per_token,
        "norm_topk_prob": model.experts_per_token > 1,  # see Router
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, letter in enumerate(model.pattern) if letter == "D"],
    }

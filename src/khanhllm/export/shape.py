"""Which of our shapes another architecture can hold, and what it calls the settings."""

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from khanhllm.errors import UserError
from khanhllm.explain import explain
from khanhllm.schema import ModelConfig
from khanhllm.settings import checked

REMOTE = "khanhllm"
"""the model_type of our own form, which transformers reads with model code of ours"""
OWN: dict[str, tuple[Any, ...]] = {
    "style": ("modern",),
    "value_embedding": (False, "normed"),
    "pair_embedding": (0,),
    "embedding_skip": (False,),
}
"""keys of [model] for which no other architecture knows other values"""


def check_stock(model: ModelConfig, target: str, remedy: str, router_bias: bool) -> None:
    """UserError, naming the key and the remedy, for a model that no architecture of `target` can hold.

    router_bias: whether it knows biased routers.
    """
    wanted = OWN if router_bias or not model.moe_layers else OWN | {"router_bias": (False,)}
    for key, theirs in wanted.items():
        if (ours := getattr(model, key)) not in theirs:
            known = " or ".join(str(value).lower() for value in theirs)
            what = f"model.{key} is {str(ours).lower()}"
            raise UserError(f"{what}, which {target} cannot express (it knows only {known}); {remedy}")


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


class Rope(BaseModel):
    rope_type: str = Field("default", validation_alias=AliasChoices("rope_type", "type"))
    rope_theta: float | None = None


class Qwen3(BaseModel):
    """What config.json says, with the defaults of transformers' Qwen3MoeConfig."""

    model_config = ConfigDict(protected_namespaces=())

    model_type: Literal["qwen3", "qwen3_moe"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: Annotated[int, Field(ge=1, le=256)]
    num_attention_heads: Annotated[int, Field(ge=1)]
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope: Rope = Field(Rope(), validation_alias=AliasChoices("rope_parameters", "rope_scaling"))
    rope_theta: float = 10_000.0
    hidden_act: str = "silu"
    attention_bias: bool = False
    use_sliding_window: bool = False
    moe_intermediate_size: int = 768
    num_experts: int = Field(128, validation_alias=AliasChoices("num_experts", "num_local_experts"))
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] | None = None


def from_qwen3(settings: dict[str, Any], where: str) -> ModelConfig:
    """Our shape for the config.json of a Qwen3 or Qwen3-MoE model: `qwen3` read backwards. UserError, naming the key,
    for what our model cannot be."""
    if settings.get("model_type") == REMOTE:
        what = "this is the form of `khanhllm export --remote-code`, which only transformers reads"
        raise UserError(f"{where}: {what}; go on from the run that it was made of, as there is no way back")
    try:
        theirs = Qwen3.model_validate({key: value for key, value in settings.items() if value is not None})
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, Qwen3, {})}; so this model cannot be imported") from None
    if settings.get("quantization_config"):
        raise UserError(f"{where}: quantization_config: quantised weights cannot be imported; take the plain ones")
    mixture, layers = theirs.model_type == "qwen3_moe", range(theirs.num_hidden_layers)
    head_dim = theirs.hidden_size / theirs.num_attention_heads
    fixed = {
        "hidden_act": (theirs.hidden_act, "silu"),
        "attention_bias": (theirs.attention_bias, False),
        "use_sliding_window": (theirs.use_sliding_window, False),
        "rope_type": (theirs.rope.rope_type, "default"),
        "head_dim": (theirs.head_dim or head_dim, head_dim),
    }
    if mixture:
        fixed["decoder_sparse_step"] = (theirs.decoder_sparse_step, 1)
        fixed["norm_topk_prob"] = (theirs.norm_topk_prob, theirs.num_experts_per_tok > 1)
    for key, (has, needs) in fixed.items():
        if has != needs:
            raise UserError(f"{where}: {key} is {has!r}, and a model here can only have {needs!r}")
    dense = set(theirs.mlp_only_layers or ()) if mixture else set(layers)
    shape = {
        "style": "modern",
        "pattern": "".join("D" if layer in dense else "M" for layer in layers),
        "dim": theirs.hidden_size,
        "heads": theirs.num_attention_heads,
        "kv_heads": theirs.num_key_value_heads or 0,
        "hidden": theirs.intermediate_size,
        "context": theirs.max_position_embeddings,
        "vocab_size": theirs.vocab_size,
        "rope_theta": theirs.rope.rope_theta or theirs.rope_theta,
        "norm_eps": theirs.rms_norm_eps,
    }
    if mixture:
        shape |= {
            "expert_hidden": theirs.moe_intermediate_size,
            "experts": theirs.num_experts,
            "experts_per_token": theirs.num_experts_per_tok,
        }
    return checked(ModelConfig, shape, where)

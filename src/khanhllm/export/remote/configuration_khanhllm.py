"""The shape of an exported KhanhLLM run, for transformers. The keys are those of [model] in its config.toml."""

from typing import Any

from transformers import PretrainedConfig


class KhanhLLMConfig(PretrainedConfig):
    model_type = "khanhllm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "hidden_size": "dim",
        "intermediate_size": "hidden",
        "max_position_embeddings": "context",
        "num_attention_heads": "heads",
        "num_key_value_heads": "kv_heads",
        "num_experts": "experts",
        "num_experts_per_tok": "experts_per_token",
    }

    def __init__(
        self,
        style: str = "modern",
        pattern: str = "DMDM",
        dim: int = 256,
        heads: int = 4,
        kv_heads: int = 0,
        hidden: int = 1024,
        expert_hidden: int = 0,
        experts: int = 8,
        experts_per_token: int = 2,
        feedforward: str = "swiglu",
        value_embedding: bool | str = False,
        value_every: int = 2,
        token_shift: bool = False,
        embedding_skip: bool = False,
        pair_embedding: int = 0,
        router_bias: bool = False,
        context: int = 256,
        vocab_size: int = 50_000,
        rope_theta: float = 10_000.0,
        norm_eps: float = 1e-5,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.style = style
        self.pattern = pattern
        self.dim = dim
        self.heads = heads
        self.kv_heads = kv_heads or heads
        self.hidden = hidden
        self.expert_hidden = expert_hidden or hidden
        self.experts = experts
        self.experts_per_token = experts_per_token
        self.feedforward = feedforward
        self.value_embedding = value_embedding
        self.value_every = value_every
        self.token_shift = token_shift
        self.embedding_skip = embedding_skip
        self.pair_embedding = pair_embedding
        self.router_bias = router_bias
        self.context = context
        self.vocab_size = vocab_size
        self.rope_theta = rope_theta
        self.norm_eps = norm_eps
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def num_hidden_layers(self) -> int:
        """Those of a cache: token_shift has as many of its own."""
        return len(self.pattern) * (2 if self.token_shift else 1)

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def activation(self) -> str:
        return self.feedforward if self.style == "modern" else "gelu"

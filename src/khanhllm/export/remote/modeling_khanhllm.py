"""The model of an exported KhanhLLM run, for transformers:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

It needs nothing of KhanhLLM, computes the same and calls its tensors the same. Shapes stand in the names of tensors:

    B rows    T positions    D width    H heads    d features of a head    S key and value heads x d
    N tokens of all rows     E experts  K experts of a token               M tokens of one expert
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils import can_return_tuple

from .configuration_khanhllm import KhanhLLMConfig

MIX = 0x9E3779B97F4A7C15 - 2**64  # 2^64 divided by the golden ratio: products with it are spread evenly
BEFORE_5_6 = "input_embeds" in inspect.signature(create_causal_mask).parameters

Rotation = tuple[Tensor, Tensor] | None


def make_norm(config: KhanhLLMConfig, size: int) -> nn.Module:
    kind = nn.RMSNorm if config.style == "modern" else nn.LayerNorm
    return kind(size, eps=config.norm_eps)


class Embedding(nn.Module):
    """A vector for each token; classic adds one for its position, and pair_embedding one for its pair with the token
    before (pairs whose hashes agree share it)."""

    def __init__(self, config: KhanhLLMConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.dim)
        self.position = nn.Embedding(config.context, config.dim) if config.style == "classic" else None
        self.pair = nn.Embedding(config.pair_embedding, config.dim) if config.pair_embedding else None

    def forward(self, ids_BT: Tensor, before_BT: Tensor, position_BT: Tensor) -> Tensor:
        x_BTD = self.token(ids_BT)
        if self.position is not None:
            x_BTD = x_BTD + self.position(position_BT)
        if self.pair is not None:
            hash_BT = ((before_BT << 24) + ids_BT) * MIX >> 16
            x_BTD = x_BTD + self.pair(hash_BT % self.pair.num_embeddings)
        return x_BTD


class EmbeddingSkip(nn.Module):
    """The input of a layer: (1 + a) x + b embedding, with two learned numbers for each layer."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.stream_L = nn.Parameter(torch.zeros(layers))
        self.embedding_L = nn.Parameter(torch.zeros(layers))

    def forward(self, x_BTD: Tensor, embedding_BTD: Tensor, layer: int) -> Tensor:
        return (1 + self.stream_L[layer]) * x_BTD + self.embedding_L[layer] * embedding_BTD


class TokenShift(nn.Module):
    """Adds the position before to the input of each layer, with a learned number for each feature; the first position
    of a text has itself before it. A cache keeps the vectors as layers of their own, behind those of attention."""

    def __init__(self, layers: int, dim: int, eps: float) -> None:
        super().__init__()
        self.eps, self.layers = eps, layers
        self.shift_LD = nn.Parameter(torch.zeros(layers, dim))

    def forward(self, x_BTD: Tensor, layer: int, new_T: Tensor, position_BT: Tensor, cache: Cache | None) -> Tensor:
        """new_T: the places of x in its row, padding and what the cache holds included."""
        normed_BTD = all_BTD = F.rms_norm(x_BTD, x_BTD.shape[-1:], eps=self.eps)
        if cache is not None:
            all_B1TD, _ = cache.update(normed_BTD.unsqueeze(1), normed_BTD[:, None, :, :1], self.layers + layer)
            all_BTD = all_B1TD[:, 0]
        before_BTD = all_BTD[:, (new_T - 1).clamp(min=0)]
        before_BTD = torch.where(position_BT.unsqueeze(-1) == 0, normed_BTD, before_BTD)
        return x_BTD + self.shift_LD[layer] * before_BTD


def angles(config: KhanhLLMConfig, position_BT: Tensor) -> Rotation:
    """Cosine and sine of the rotary angles, (B, 1, T, d) in fp32; None for classic, which learns its positions."""
    if config.style == "classic":
        return None
    even_d = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=position_BT.device)
    angle_BTd = position_BT[..., None] * config.rope_theta ** (-even_d / config.head_dim)
    angle_B1Td = torch.cat((angle_BTd, angle_BTd), dim=-1).unsqueeze(1)
    return angle_B1Td.cos(), angle_B1Td.sin()


def rotate(x_BHTd: Tensor, rotation: Rotation) -> Tensor:
    if rotation is None:
        return x_BHTd
    cos_B1Td, sin_B1Td = rotation
    first, second = x_BHTd.chunk(2, dim=-1)
    quarter_turn = torch.cat((-second, first), dim=-1)
    return (x_BHTd * cos_B1Td + quarter_turn * sin_B1Td).to(x_BHTd.dtype)


class Attention(nn.Module):
    is_causal = True  # this and num_key_value_groups: for the attention functions of transformers

    def __init__(self, config: KhanhLLMConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer
        self.num_key_value_groups = config.heads // config.kv_heads
        modern, shared = config.style == "modern", config.kv_heads * config.head_dim
        self.query = nn.Linear(config.dim, config.dim, bias=not modern)
        self.key = nn.Linear(config.dim, shared, bias=not modern)
        self.value = nn.Linear(config.dim, shared, bias=not modern)
        self.out = nn.Linear(config.dim, config.dim, bias=not modern)
        self.query_norm = make_norm(config, config.head_dim) if modern else nn.Identity()
        self.key_norm = make_norm(config, config.head_dim) if modern else nn.Identity()

    def forward(
        self, x_BTD: Tensor, own_BTS: Tensor | None, rotation: Rotation, mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        query_BHTd = rotate(self.query_norm(self._heads(self.query(x_BTD))), rotation)
        key_BHTd = rotate(self.key_norm(self._heads(self.key(x_BTD))), rotation)
        value_BTS = self.value(x_BTD)
        value_BHTd = self._heads(value_BTS if own_BTS is None else value_BTS + own_BTS)
        if cache is not None:
            key_BHTd, value_BHTd = cache.update(key_BHTd, value_BHTd, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation, eager_attention_forward)
        scaling = self.config.head_dim**-0.5
        out_BTHd, _ = attend(self, query_BHTd, key_BHTd, value_BHTd, mask, scaling=scaling, dropout=0.0)
        return self.out(out_BTHd.flatten(2))

    def _heads(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)


def activate(kind: str, up: Tensor, gate: Tensor | None) -> Tensor:
    if gate is not None:
        return F.silu(gate) * up
    return F.relu(up).square() if kind == "relu2" else F.gelu(up)


class FeedForward(nn.Module):
    def __init__(self, config: KhanhLLMConfig) -> None:
        super().__init__()
        self.kind, bias = config.activation, config.style == "classic"
        self.gate = nn.Linear(config.dim, config.hidden, bias=False) if self.kind == "swiglu" else None
        self.up = nn.Linear(config.dim, config.hidden, bias=bias)
        self.down = nn.Linear(config.hidden, config.dim, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate = None if self.gate is None else self.gate(x_BTD)
        return self.down(activate(self.kind, self.up(x_BTD), gate))


class Router(nn.Linear):
    """The K likeliest experts of each token, and their weights: renormalised to sum to 1, but for K = 1 the probability
    itself. A bias moves the choice only. All in fp32: rounding would send tokens to other experts."""

    def __init__(self, config: KhanhLLMConfig) -> None:
        super().__init__(config.dim, config.experts, bias=False)
        self.per_token = config.experts_per_token
        self.register_buffer("bias_E", torch.zeros(config.experts) if config.router_bias else None)

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x_ND.device.type, enabled=False):
            prob_NE = F.linear(x_ND.float(), self.weight.float()).softmax(dim=-1)
        score_NE = prob_NE if self.bias_E is None else prob_NE + self.bias_E
        expert_NK = score_NE.topk(self.per_token, dim=-1).indices
        weight_NK = prob_NE.gather(-1, expert_NK)
        return expert_NK, weight_NK if self.per_token == 1 else weight_NK / weight_NK.sum(dim=-1, keepdim=True)


class Experts(nn.Module):
    """The feed-forwards of a mixture layer, stacked: (E, in, out)."""

    def __init__(self, config: KhanhLLMConfig) -> None:
        super().__init__()
        self.kind, experts, dim, hidden = config.activation, config.experts, config.dim, config.expert_hidden
        self.gate = nn.Parameter(torch.empty(experts, dim, hidden)) if self.kind == "swiglu" else None
        self.up = nn.Parameter(torch.empty(experts, dim, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, dim))
        self.up_bias = nn.Parameter(torch.empty(experts, hidden)) if self.kind == "gelu" else None
        self.down_bias = nn.Parameter(torch.empty(experts, dim)) if self.kind == "gelu" else None

    def forward(self, x_MD: Tensor, expert: int) -> Tensor:
        up_MF = x_MD @ self.up[expert]
        if self.up_bias is not None:
            up_MF = up_MF + self.up_bias[expert]
        gate_MF = None if self.gate is None else x_MD @ self.gate[expert]
        y_MD = activate(self.kind, up_MF, gate_MF) @ self.down[expert]
        return y_MD if self.down_bias is None else y_MD + self.down_bias[expert]


class Mixture(nn.Module):
    def __init__(self, config: KhanhLLMConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        expert_NK, weight_NK = self.router(x_ND)
        y_ND = torch.zeros_like(x_ND)
        for expert in expert_NK.unique().tolist():
            token_M, choice_M = torch.where(expert_NK == expert)
            y_MD = self.experts(x_ND[token_M], expert) * weight_NK[token_M, choice_M, None]
            y_ND.index_add_(0, token_M, y_MD.to(y_ND.dtype))
        return y_ND.view_as(x_BTD)


class Block(GradientCheckpointingLayer):
    def __init__(self, config: KhanhLLMConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config, config.dim)
        self.attention = Attention(config, layer)
        self.feedforward_norm = make_norm(config, config.dim)
        self.feedforward = FeedForward(config) if config.pattern[layer] == "D" else Mixture(config)

    def forward(
        self,
        x_BTD: Tensor,
        own_BTS: Tensor | None,
        rotation: Rotation,
        mask: Tensor | None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), own_BTS, rotation, mask, past_key_values)
        return x_BTD + self.feedforward(self.feedforward_norm(x_BTD))


class Head(nn.Linear):
    """The last norm and the output matrix."""

    def __init__(self, config: KhanhLLMConfig) -> None:
        super().__init__(config.dim, config.vocab_size, bias=False)
        self.norm = make_norm(config, config.dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return super().forward(self.norm(x_BTD)).float()


class KhanhLLMForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = KhanhLLMConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["router"]  # noqa: RUF012

    def __init__(self, config: KhanhLLMConfig) -> None:
        super().__init__(config)
        layers, shared = len(config.pattern), config.kv_heads * config.head_dim
        self.embedding = Embedding(config)
        with_values = (
            range((layers - 1) % config.value_every, layers, config.value_every) if config.value_embedding else ()
        )
        tables = {str(layer): nn.Embedding(config.vocab_size, shared) for layer in with_values}
        self.value_embedding = nn.ModuleDict({"tables": nn.ModuleDict(tables)})
        self.embedding_skip = EmbeddingSkip(layers) if config.embedding_skip else None
        self.token_shift = TokenShift(layers, config.dim, config.norm_eps) if config.token_shift else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(layers))
        self.head = Head(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Experts):
            for weight in module.parameters():
                nn.init.normal_(weight, std=0.02)
        elif isinstance(module, EmbeddingSkip | TokenShift):
            for weight in module.parameters():
                nn.init.zeros_(weight)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding.token

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding.token = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        before_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """before_ids: the token before each of input_ids, which pair_embedding wants where they continue a cache."""
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=self.config)
        new = past + torch.arange(input_ids.shape[1], device=input_ids.device)
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -len(new) :]
        elif position_ids is None:
            position_ids = new.unsqueeze(0)
        if before_ids is None:
            if self.config.pair_embedding and past:
                raise ValueError("pair_embedding needs the token before: pass before_ids, or all ids to generate()")
            before_ids = F.pad(input_ids, (1, -1))
        before_ids = before_ids.masked_fill(position_ids == 0, 0)  # a text begins, maybe after padding

        x_BTD = embedding_BTD = self.embedding(input_ids, before_ids, position_ids)
        mask = create_causal_mask(
            config=self.config,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            **({"input_embeds": x_BTD, "cache_position": new} if BEFORE_5_6 else {"inputs_embeds": x_BTD}),
        )
        rotation, tables = angles(self.config, position_ids), self.value_embedding["tables"]
        for layer, block in enumerate(self.blocks):
            if self.embedding_skip is not None:
                x_BTD = self.embedding_skip(x_BTD, embedding_BTD, layer)
            if self.token_shift is not None:
                x_BTD = self.token_shift(x_BTD, layer, new, position_ids, past_key_values)
            own_BTS = tables[str(layer)](input_ids) if str(layer) in tables else None
            if own_BTS is not None and self.config.value_embedding == "normed":
                scale_BT1 = (x_BTD.float().square().mean(-1, keepdim=True) + self.config.norm_eps).rsqrt()
                own_BTS = own_BTS * scale_BT1.to(own_BTS.dtype)
            x_BTD = block(x_BTD, own_BTS, rotation, mask, past_key_values=past_key_values)

        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(x_BTD[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if (new := inputs["input_ids"].shape[1]) < input_ids.shape[1]:
            inputs["before_ids"] = input_ids[:, -new - 1 : -1]
        return inputs

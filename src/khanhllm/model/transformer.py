"""The whole model: blocks from a pattern string such as "DMDM". Every choice of style is made here, once."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import overload

import torch
from torch import Tensor, nn

from khanhllm.model.attention import Attention, same_document
from khanhllm.model.block import Block
from khanhllm.model.cache import KVCache, LayerCache, TextCache
from khanhllm.model.embedding import (
    EmbeddingSkip,
    NoSkip,
    StreamScale,
    TokenEmbedding,
    TokenPositionEmbedding,
    ValueEmbedding,
)
from khanhllm.model.experts import GeluExperts, Relu2Experts, SwiGLUExperts
from khanhllm.model.feedforward import GeluFeedForward, Relu2FeedForward, SwiGLUFeedForward
from khanhllm.model.head import Head
from khanhllm.model.induction import start_with_induction
from khanhllm.model.moe import MoE
from khanhllm.model.norm import RMSNorm
from khanhllm.model.roles import Role, role
from khanhllm.model.rope import NoRope, Rope
from khanhllm.model.router import Router, Routing
from khanhllm.model.token_shift import TokenShift
from khanhllm.schema import ModelConfig

Closed = Mapping[int, Tensor]
"""for mixture layers, (B, E): the experts that each row must do without"""
ALL_OPEN: Closed = {}


class Transformer(nn.Module):
    """Decoder-only transformer of dense and mixture layers.

    `chunk` is the number of rows of logits that exist at one time (tokens).
    """

    def __init__(self, config: ModelConfig, chunk: int = 512) -> None:
        super().__init__()
        self.config = config
        build = _classic if config.style == "classic" else _modern
        self.embedding, self.blocks, norm = build(config)
        layers = len(config.pattern)
        every, normed = config.value_every, config.value_embedding == "normed"
        with_values = range((layers - 1) % every, layers, every) if config.value_embedding else ()
        size = config.key_value_heads * config.head_dim
        self.value_embedding = ValueEmbedding(with_values, config.vocab_size, size, normed, config.norm_eps)
        self.embedding_skip = _skip(config)
        self.token_shift = TokenShift(layers, config.dim, config.norm_eps) if config.token_shift else None
        self.head = Head(norm, config.dim, config.vocab_size, chunk)

    @overload
    def forward(self, inputs_BT: Tensor) -> Tensor: ...
    @overload
    def forward(
        self,
        inputs_BT: Tensor,
        targets_BT: Tensor,
        counted_N: Tensor | None = None,
        place_BT: Tensor | None = None,
        padding_BT: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Routing, ...]]: ...
    def forward(
        self,
        inputs_BT: Tensor,
        targets_BT: Tensor | None = None,
        counted_N: Tensor | None = None,
        place_BT: Tensor | None = None,
        padding_BT: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, tuple[Routing, ...]]:
        """Negative log-likelihood of each target (nats), (B, T), and one Routing per mixture layer; without targets,
        the logits (B, T, V).

        counted_N: only these targets, by their place in the flattened ones; the answer is then (N,). place_BT: the
        position of each token in its own document; documents then do not see each other. padding_BT: tokens that only
        fill a row; they do not count in the Routing.
        """
        if targets_BT is None:
            return self.logits(inputs_BT)
        x_BTD, routings = self.trunk(inputs_BT, place_BT=place_BT, padding_BT=padding_BT)
        return self.head(x_BTD, targets_BT, counted_N), routings

    def trunk(
        self,
        ids_BT: Tensor,
        cache: KVCache | None = None,
        closed: Closed = ALL_OPEN,
        place_BT: Tensor | None = None,
        padding_BT: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """Everything below the head: (B, T, D) and the routings. With a cache, the ids continue those it holds."""
        end = (cache.length if cache else 0) + ids_BT.shape[1]
        if end > self.config.context:
            raise ValueError(f"{end} positions, but the model's context is {self.config.context}")
        start, before_B1 = (cache.start, cache.last_B1) if cache else (0, None)
        x_BTD = embedding_BTD = self.embedding(ids_BT, start if place_BT is None else place_BT, before_B1)
        mask_BHTS = None if place_BT is None else same_document(place_BT, x_BTD)
        if cache:
            cache.last_B1 = ids_BT[:, -1:]
        pasts = cache.layers if cache else [None] * len(self.blocks)
        routings: tuple[Routing, ...] = ()
        for layer, (block, past) in enumerate(zip(self.blocks, pasts, strict=True)):
            x_BTD = self.embedding_skip(x_BTD, embedding_BTD, layer)
            if self.token_shift is not None:
                x_BTD = self.token_shift(x_BTD, layer, past, place_BT)
            own_BTS = self.value_embedding(ids_BT, layer, x_BTD)
            x_BTD, more = block(x_BTD, past, own_BTS, mask_BHTS, closed.get(layer), padding_BT)
            routings += more
        return x_BTD, routings

    def logits(self, ids_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits of the token after each position: (B, T, V)."""
        return self.head.logits(self.trunk(ids_BT, cache)[0])

    def next_logits(self, ids_BT: Tensor, cache: KVCache, closed: Closed = ALL_OPEN) -> Tensor:
        """Logits of the token after the last position, which generation needs: (B, V)."""
        return self.head.logits(self.trunk(ids_BT, cache, closed)[0][:, -1:])[:, 0]

    def parts(self) -> list[nn.Module]:
        """All but a few numbers of the model, cut where a forward goes from one part to the next."""
        return [self.embedding, *self.value_embedding.tables.values(), *self.blocks, self.head]

    def new_cache(self, rows: int = 1) -> KVCache:
        """An empty cache for `rows` texts of one length."""
        return KVCache(self._new_layers(rows))

    def new_text_cache(self, rows: int) -> TextCache:
        """An empty cache for `rows` texts that grow independently."""
        return TextCache(self._new_layers(rows))

    def _new_layers(self, rows: int) -> list[LayerCache]:
        """Empty caches. They begin with zeros: attention gives weight 0 to what a shorter row has not filled yet, and
        0 times what unused memory may hold, NaN, is NaN."""
        config, weight = self.config, self.head.weight
        empty = partial(torch.zeros, device=weight.device, dtype=weight.dtype)
        shapes = [(rows, config.key_value_heads, config.context, config.head_dim)] * 2
        if config.token_shift:
            shapes.append((rows, 1, config.context, config.dim))
        return [LayerCache([empty(shape) for shape in shapes]) for _ in self.blocks]

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Set all initial weights: GPT-2's normal(0, 0.02) at width 1024, scaled with the width
        (sigma = 0.64 / sqrt(dim)). Matrices that write into the residual stream are divided by sqrt(2 x layers), and
        the head is halved so that the first loss is close to ln(vocabulary). Biases, skips and the vectors of pairs and
        values are zero; norms are one. With `zero_out`, what writes into the residual stream is zero too. The classic
        style's tokens have sigma 0.64 at any width: at 0.02 the first layer's answer outweighs the token itself, and
        all tokens look alike to the routers for a hundred steps (benchmarks/stability.py). With `induction_head`,
        model/induction.py changes some of them."""
        for name, buffer in self.named_buffers():
            if name.endswith("router.bias_E"):
                buffer.zero_()
        sigma = 0.64 / self.config.dim**0.5
        scale = {Role.OUTPUT: (2 * len(self.blocks)) ** -0.5, Role.HEAD: 0.5}
        zero = {Role.BIAS, Role.ADDED, Role.SKIP} | ({Role.OUTPUT} if self.config.zero_out else set())
        for name, parameter in self.named_parameters():
            kind = role(name)
            if kind in zero:
                parameter.zero_()
            elif kind is Role.NORM:
                parameter.fill_(1)
            elif kind is Role.TOKEN and self.config.style == "classic":
                parameter.normal_(0, 0.64, generator=generator)
            else:
                parameter.normal_(0, sigma * scale.get(kind, 1), generator=generator)
        if self.config.induction_head:
            first, second = (block.attention for block in self.blocks[:2])
            tokens_VD = self.get_parameter("embedding.token.weight")
            start_with_induction(tokens_VD, self.head.weight, first, second, generator)


def _skip(config: ModelConfig) -> nn.Module:
    if config.embedding_skip:
        return EmbeddingSkip(len(config.pattern))
    return StreamScale(len(config.pattern)) if config.stream_scale else NoSkip()


def _classic(config: ModelConfig) -> tuple[nn.Module, nn.ModuleList, nn.Module]:
    """LayerNorm, learned positions, GELU, biases: the reference model to the letter."""
    norm = partial(nn.LayerNorm, config.dim, eps=config.norm_eps)
    attention = partial(Attention, config, NoRope(), nn.Identity, bias=True)
    blocks = _blocks(config, attention, GeluFeedForward, GeluExperts, norm)
    return TokenPositionEmbedding(config.vocab_size, config.dim, config.context), blocks, norm()


def _modern(config: ModelConfig) -> tuple[nn.Module, nn.ModuleList, nn.Module]:
    """RMSNorm, RoPE, QK-norm, SwiGLU, no biases: the shape of Qwen3-MoE, so its tools can read the weights."""
    norm = partial(RMSNorm, config.dim, eps=config.norm_eps)
    rope = Rope(config.head_dim, config.context, config.rope_theta)
    attention = partial(Attention, config, rope, RMSNorm, bias=False)
    swiglu = config.feedforward == "swiglu"
    dense, experts = (SwiGLUFeedForward, SwiGLUExperts) if swiglu else (Relu2FeedForward, Relu2Experts)
    blocks = _blocks(config, attention, dense, experts, norm)
    tokens = TokenEmbedding(config.vocab_size, config.dim, config.pair_embedding, config.token_norm, config.norm_eps)
    return tokens, blocks, norm()


def _blocks(
    config: ModelConfig,
    attention: Callable[[], Attention],
    dense: Callable[[int, int], nn.Module],
    experts: Callable[[int, int, int], nn.Module],
    norm: Callable[[], nn.Module],
) -> nn.ModuleList:
    """One block for each letter of the pattern string, from the parts of a style."""

    def feedforward(letter: str) -> nn.Module:
        if letter == "D":
            return dense(config.dim, config.hidden)
        return MoE(_router(config), experts(config.experts, config.dim, config.expert_width))

    return nn.ModuleList(Block(attention(), feedforward(letter), (norm(), norm())) for letter in config.pattern)


def _router(config: ModelConfig) -> Router:
    return Router(config.dim, config.experts, config.experts_per_token, config.router_bias)

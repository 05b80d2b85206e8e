"""Count a model's parameters and its arithmetic per token. The meta device will do, where a model takes no memory."""

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from khanhllm.model.moe import MoE
from khanhllm.model.transformer import Transformer
from khanhllm.schema import ModelConfig


def on_paper(config: ModelConfig) -> Transformer:
    """The model on the meta device: shapes without memory."""
    with torch.device("meta"):
        return Transformer(config)


def total_parameters(model: nn.Module) -> int:
    """Numbers in all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def active_parameters(model: Transformer) -> int:
    """Parameters that work on one token: of the experts, only the chosen ones."""
    config = model.config
    stacks = [module.experts for module in model.modules() if isinstance(module, MoE)]
    idle = sum(total_parameters(stack) for stack in stacks) * (config.experts - config.experts_per_token)
    return total_parameters(model) - idle // config.experts


def flops_per_token(model: Transformer) -> int:
    """Floating-point operations to train on one token, forward and backward, without recomputation.

    6 for each active parameter that multiplies, and 12 x layers x dim x context for attention as if every position saw
    the whole context (PaLM's convention, arXiv 2204.02311 appendix B).
    """
    config = model.config
    lookup = total_parameters(model.embedding) + total_parameters(model.value_embedding)
    return 6 * (active_parameters(model) - lookup) + 12 * len(model.blocks) * config.dim * config.context


def product_flops(x_shape: torch.Size, y_shape: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    """Floating-point operations of a product in `experts`, in any backend: each number of x meets a row of y."""
    return 2 * x_shape.numel() * y_shape[-1]


# Without a formula, torch's FlopCounterMode counts nothing for experts.
PRODUCTS = [torch.ops.aten._grouped_mm, torch.ops.khanhllm.loop_grouped_mm, torch.ops.khanhllm.loop_grouped_mm_wgrad]
register_flop_formula([op for op in PRODUCTS if op not in flop_registry])(product_flops)  # type: ignore[no-untyped-call]

"""Adapt a model to the machine, from outside and in this order: bf16 weights, device, experts' backend, activation
checkpointing, compile. The model's own code and the names of its parameters stay as they are."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from khanhllm.machine.devices import Machine
from khanhllm.machine.precision import keep_in_bf16
from khanhllm.model import Transformer
from khanhllm.model.counts import total_parameters
from khanhllm.model.experts import GROUPED, LOOP, Backend
from khanhllm.model.moe import MoE
from khanhllm.schema import ModelConfig

# What selective checkpointing keeps because it is expensive to recompute: matrix products and attention.
KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}

LARGE = 100_000_000
"""parameters from which on memory matters more than the time to allocate it"""


def is_small(model: Transformer) -> bool:
    """Whether training this model is faster if the process keeps freed memory."""
    return total_parameters(model) < LARGE


def adapt(
    model: Transformer,
    machine: Machine,
    checkpointing: str = "none",
    weights: str = "fp32",
    gradients: str = "fp32",
    move: bool = True,
) -> Transformer:
    """Change the model in place and return it.

    weights, gradients: fp32 or bf16, the types of matrices and of their summed gradients. checkpointing:
    none, selective or full. move: whether all of it goes to the device; if not, `Sharded` brings a part of it there.
    """
    if weights == "bf16":
        keep_in_bf16(model, gradients)
    if move and next(model.parameters()).device != machine.device:
        model.to(machine.device)
    backend = _backend(machine.experts, model.config)
    for module in model.modules():
        if isinstance(module, MoE):
            module.experts.backend = backend  # type: ignore[assignment]
    if checkpointing != "none":
        _checkpoint_activations(model, selective=checkpointing == "selective")
    if machine.compile:
        # torch warns when it runs a model uncompiled after too many in one process; users need not know
        logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
        for block in model.blocks:  # blocks of one kind share compiled code
            if isinstance(block.feedforward, MoE) and machine.group.parts > 1:  # how many tokens come is never the same
                block.feedforward.answer = torch.compiler.disable(block.feedforward.answer)  # type: ignore[method-assign]
            compiled = torch.compile(block.forward, dynamic=False)
            block.forward = _only_with_gradients(compiled, block.forward)
    return model


def uncompile(model: Transformer) -> None:
    """Let the blocks run as they are written."""
    for block in model.blocks:
        del block.forward


def _backend(name: str, shape: ModelConfig) -> Backend:
    if name == "triton":
        from khanhllm.machine import triton_grouped  # only here, as triton may be missing

        return triton_grouped.BACKEND
    return GROUPED if name == "grouped" and aligned(shape) else LOOP


def aligned(shape: ModelConfig) -> bool:
    """Whether grouped_mm takes experts of this shape: it wants rows of 16 bytes."""
    return shape.dim % 8 == shape.expert_width % 8 == 0


def _checkpoint_activations(model: Transformer, selective: bool) -> None:
    """Recompute the inside of each sub-layer in the backward pass (Chen et al. 2016, arXiv 1604.06174).

    In a mixture layer only the experts' answer is recomputed, not the router. So the same tokens go to the same experts
    the second time, and nothing is counted twice.
    """
    for block in model.blocks:
        _recompute(block.attention, "forward", selective)  # type: ignore[arg-type]
        if not isinstance(block.feedforward, MoE):
            _recompute(block.feedforward, "forward", selective)  # type: ignore[arg-type]
        elif not selective:  # experts alone already keep only products that are expensive to recompute
            _recompute(block.feedforward, "answer", selective)


def _recompute(module: torch.nn.Module, method: str, selective: bool) -> None:
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing here is random
    if selective:
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    run = partial(checkpoint, getattr(module, method), **settings)
    setattr(module, method, _only_with_gradients(run, getattr(module, method)))


def _only_with_gradients(training: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """Call `training` for forwards with gradients, which have one shape. Generation and validation have many shapes,
    and nothing to recompute: they call `plain`."""

    def method(*inputs: Any) -> Any:
        return training(*inputs) if torch.is_grad_enabled() else plain(*inputs)

    return method


def _policy(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE

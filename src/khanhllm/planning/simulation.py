"""Simulate one optimizer step, to measure how much memory it takes.

The real model, the real backward pass and the real optimizer run on fake tensors, which have shapes and no memory
(torch's FakeTensorMode), while a `MemoryTrace` notes when each storage is allocated and freed. So chunked logits,
recomputed activations, custom gradients, autocast's copies and whatever else the code does are counted because they
happen; a change of the model needs no change here. The trace does not see buffers inside a kernel.

The step is that of `step.py`: micro-batch forward and backward, clip, update. It is the second step of a run, not the
first: moments exist already, and so do gradients if micro-batches are accumulated.
"""

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from khanhllm import optim
from khanhllm.machine.adapt import adapt
from khanhllm.machine.backends import BackendName
from khanhllm.machine.devices import Machine
from khanhllm.model import Transformer, losses
from khanhllm.model.exchange import Exchange, Part, Way, spread
from khanhllm.schema import Config

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "work space")
aten = torch.ops.aten


def _attention_flops(query: Tensor, key: Tensor, *_args: Any, **_kwargs: Any) -> int:
    """Operations of attention as if every position saw all others (PaLM's convention)."""
    return 4 * query.numel() * key.shape[-2]


def _attention_backward_flops(_grad: Tensor, query: Tensor, key: Tensor, *_args: Any, **_kwargs: Any) -> int:
    return 10 * query.numel() * key.shape[-2]


FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten.addmm_: flop_registry[aten.addmm],  # by which the head sums its gradient
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


@dataclass(frozen=True)
class SimulatedStep:
    """What one step takes: all in bytes, but for `flops` and `update`, which are operations."""

    weights: int
    """parameters and buffers, exact"""
    gradients: int
    """one for each parameter, exact once the last backward pass is done"""
    optimizer: int
    """the optimizer's state, exact"""
    at_peak: dict[str, int]
    """memory in use at the peak of a step, by PARTS"""
    flops: int
    """multiplications and additions for one micro-batch, recomputed activations included"""
    update: int = 0
    """those of the update, once a step; 0 if it was not simulated"""

    @property
    def peak(self) -> int:
        """Most memory in use at one time (bytes)."""
        return sum(self.at_peak.values())


class EvenExchange(Exchange):
    """As if as many tokens came from the other processes as go there."""

    def shared_out(self, load_E: Tensor) -> tuple[Tensor, Way]:
        return load_E.long().view(self.part.of, -1), Way(self.swap, [], [])


class MemoryTrace(TorchDispatchMode):
    """Notes when storages are allocated and freed (bytes), and counts floating-point operations, while it is active."""

    def __init__(self, vocab_size: int, cpu: bool) -> None:
        super().__init__()
        self.vocab_size, self.cpu = vocab_size, cpu
        self.names: dict[int, int] = {}
        """address of each living storage -> its number"""
        self.sizes: list[int] = []
        self.part: list[str] = []
        self.events: list[int] = []
        """number of a storage that was allocated, or -1 - number if it was freed"""
        self.flops = 0
        self.forward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.cpu and func.name() == "bitsandbytes::optimizer_update_8bit_blockwise":
            with self:  # a CPU has no kernel for it but a Python function that makes large temporaries: they count
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if func is not torch.ops.prim.device.default:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self.number(leaf)
            count = FLOPS.get(func._overloadpacket)
            self.flops += count(*args, **(kwargs or {}), out_val=out) if count else 0
        return out

    def number(self, tensor: Tensor) -> int:
        """The number of the tensor's storage; a storage seen for the first time gets a new one."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self.names:
            number = self.names[address] = len(self.sizes)
            self.sizes.append(storage.nbytes())
            self.part.append(self._part(tensor))
            self.events.append(number)
            weakref.finalize(storage, self._freed, address).atexit = False
        return self.names[address]

    def _freed(self, address: int) -> None:
        self.events.append(-1 - self.names.pop(address))

    def _part(self, tensor: Tensor) -> str:
        if tensor.dim() > 1 and tensor.shape[-1] == self.vocab_size:
            return "logits"
        return "activations" if self.forward or torch.is_grad_enabled() else "work space"

    def name(self, part: str, tensors: list[Tensor]) -> int:
        """Assign tensors to a part. Returns their bytes, each storage once."""
        numbers = {self.number(tensor) for tensor in tensors}
        for number in numbers:
            self.part[number] = part
        return sum(self.sizes[number] for number in numbers)

    def fullest(self, start: int, end: int) -> dict[str, int]:
        """Memory in use at the peak between events `start` and `end`, by part."""
        alive, most, moment = 0, -1, 0
        for index, number in enumerate(self.events[:end]):
            alive += self.sizes[number] if number >= 0 else -self.sizes[-1 - number]
            if index >= start - 1 and alive > most:
                most, moment = alive, index
        living = Counter(number if number >= 0 else -1 - number for number in self.events[: moment + 1])
        size: Counter[str] = Counter()
        for number, times in living.items():
            size[self.part[number]] += self.sizes[number] if times == 1 else 0
        return {part: size[part] for part in PARTS}


@lru_cache(maxsize=256)
def simulate_step(config: Config, precision: str, device: str, update: bool = True) -> SimulatedStep:
    """Simulate a step of `config` (micro_batch a number) on a `device` ("cpu", "cuda") that computes in `precision`.

    Without `update` only forward and backward run, which is several times quicker; the result has the optimizer's state
    in either case.
    """
    shape, train = config.model, config.train
    trace = MemoryTrace(shape.vocab_size, cpu=device == "cpu")
    backend: BackendName = "grouped" if precision == "bf16" and device == "cuda" else "loop"
    machine = Machine(torch.device("cpu"), precision, compile=False, experts=backend)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        model = Transformer(shape, config.loss.chunk)
        kind = config.machine
        if kind.expert_processes > 1:
            spread(model, Part(0, kind.expert_processes), lambda rows, *_: rows.clone(), EvenExchange)
        model = adapt(model, machine, kind.checkpointing, kind.weights, kind.gradients)
        ids_BT = torch.zeros(train.rows, shape.context + 1, dtype=torch.int64)
        load_LE = torch.zeros(len(shape.moe_layers), shape.experts)
    optimizer = optim.build(model, config.optim)
    parameters = list(model.parameters())
    with fake, trace:
        weights = trace.name("weights", [*parameters, *model.buffers()])
        if train.accumulation > 1:
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter, dtype=parameter.grad_dtype)  # type: ignore[attr-defined]
            trace.name("gradients", [parameter.grad for parameter in parameters if parameter.grad is not None])
        start = len(trace.events)
        _gradient(model, config, machine, trace, ids_BT, load_LE)
        gradients = trace.name("gradients", [p.grad for p in parameters if p.grad is not None])
        torch.nn.utils.clip_grad_norm_(parameters, config.optim.clip or torch.inf)
        backward_done, flops = len(trace.events), trace.flops
        if update:
            for group in optimizer.param_groups:
                group["step"] = 0  # a step in which most experts move, where they take turns
            optimizer.step()
            moments = [value for state in optimizer.state.values() for value in state.values()]
            trace.name("optimizer", [value for value in moments if isinstance(value, Tensor)])
    state = optim.state_size(optimizer)
    fullest = trace.fullest(start, backward_done)  # a second step, in which the state exists already
    fullest["optimizer"] = state
    if update:
        fullest = max(fullest, trace.fullest(backward_done, len(trace.events)), key=lambda parts: sum(parts.values()))
    return SimulatedStep(weights, gradients, state, fullest, flops, trace.flops - flops)


def _gradient(
    model: Transformer, config: Config, machine: Machine, trace: MemoryTrace, ids_BT: Tensor, load_LE: Tensor
) -> None:
    """Run forward and backward of one micro-batch, as `train_step` does."""
    trace.forward = True
    inputs_BT, targets_BT, tokens = ids_BT[:, :-1], ids_BT[:, 1:], config.tokens_per_step
    place_BT = inputs_BT if config.train.document_mask else None  # only their shape matters
    extras = (None, place_BT, None)  # and as if every target counted
    loss, _, _ = losses.micro_batch_loss(
        model, inputs_BT, targets_BT, load_LE, tokens, config.loss, machine.autocast(), extras=extras
    )
    trace.forward = False
    loss.backward()  # type: ignore[no-untyped-call]

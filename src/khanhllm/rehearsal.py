"""A dress rehearsal of one optimizer step, on paper: how much memory it takes is read off, not guessed.

The real model, the real backward pass and the real optimizer run on fake tensors, which have shapes and no memory
(torch's FakeTensorMode), while a `Tape` notes when each storage is born and when it dies. So chunked logits, rebuilt
activations, custom gradients, autocast's copies and whatever else the code does are counted because they happen; a
change of the model needs no change here. What it cannot see is inside a kernel: packing buffers and the like.

A step as in `train.py`: micro-batch forward and backward, clip, update. Moments exist already, and so do gradients
where micro-batches are accumulated: it is the second step, not the first.
"""

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from khanhllm import objectives, optim
from khanhllm.config import Config
from khanhllm.machine.fit import fit
from khanhllm.machine.runtime import Machine
from khanhllm.model import Transformer
from khanhllm.model.router import stack

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "work space")
aten = torch.ops.aten


def _product_flops(left: Tensor, right: Tensor, *_args: Any, **_kwargs: Any) -> int:
    return 2 * left.numel() * right.shape[-1]


def _attention_flops(query: Tensor, key: Tensor, *_args: Any, **_kwargs: Any) -> int:
    """As if every position saw all others (PaLM's convention)."""
    return 4 * query.numel() * key.shape[-2]


def _attention_backward_flops(_grad: Tensor, query: Tensor, key: Tensor, *_args: Any, **_kwargs: Any) -> int:
    return 10 * query.numel() * key.shape[-2]


FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._grouped_mm: _product_flops,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


@dataclass(frozen=True)
class Rehearsal:
    """All in bytes, but for `flops`."""

    weights: int
    """parameters and buffers, exact"""
    gradients: int
    """one for each parameter, exact once the last backward pass is done"""
    optimizer: int
    """the optimizer's state, exact"""
    at_peak: dict[str, int]
    """what is alive at the fullest moment of a step, by PARTS"""
    flops: int
    """multiplications and additions carried out for one micro-batch, rebuilt activations included"""

    @property
    def peak(self) -> int:
        return sum(self.at_peak.values())


class Tape(TorchDispatchMode):
    """Births and deaths of storages (bytes), and floating-point operations, of all that runs under it.

    `pairs` token-expert pairs are spread evenly over `experts` where code asks for the counts on the host.
    """

    def __init__(self, vocab_size: int, pairs: int, experts: int) -> None:
        super().__init__()
        self.vocab_size, self.pairs, self.experts = vocab_size, pairs, experts
        self.names: dict[int, int] = {}
        """address of each living storage -> its number"""
        self.sizes: list[int] = []
        self.part: list[str] = []
        self.events: list[int] = []
        """the number of each storage that was born, or -1 - number where one died"""
        self.flops = 0
        self.forward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default and args[0].dtype in (torch.int32, torch.int64):
            return self._even(args[0])
        out = _kernel(func)(*args, **(kwargs or {}))
        if func is not torch.ops.prim.device.default:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self.number(leaf)
            count = FLOPS.get(func._overloadpacket)
            self.flops += count(*args, **(kwargs or {}), out_val=out) if count else 0
        return out

    def number(self, tensor: Tensor) -> int:
        """The number of the tensor's storage, which is a new one where it has not been seen."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self.names:
            number = self.names[address] = len(self.sizes)
            self.sizes.append(storage.nbytes())
            self.part.append(self._part(tensor))
            self.events.append(number)
            weakref.finalize(storage, self._died, address).atexit = False
        return self.names[address]

    def _died(self, address: int) -> None:
        self.events.append(-1 - self.names.pop(address))

    def _part(self, tensor: Tensor) -> str:
        if tensor.dim() > 1 and tensor.shape[-1] == self.vocab_size:
            return "logits"
        return "activations" if self.forward or torch.is_grad_enabled() else "work space"

    def _even(self, count: Tensor) -> int:
        """An expert's share of the pairs, told from its place among the counts."""
        place = count.storage_offset()
        return self.pairs * (place + 1) // self.experts - self.pairs * place // self.experts

    def name(self, part: str, tensors: list[Tensor]) -> int:
        """These are `part`; returns their bytes, each storage once."""
        numbers = {self.number(tensor) for tensor in tensors}
        for number in numbers:
            self.part[number] = part
        return sum(self.sizes[number] for number in numbers)

    def fullest(self, start: int) -> dict[str, int]:
        """What was alive at the fullest moment after the first `start` events, by part."""
        alive, most, moment = 0, -1, 0
        for index, number in enumerate(self.events):
            alive += self.sizes[number] if number >= 0 else -self.sizes[-1 - number]
            if index >= start - 1 and alive > most:
                most, moment = alive, index
        living = Counter(number if number >= 0 else -1 - number for number in self.events[: moment + 1])
        found: Counter[str] = Counter()
        for number, times in living.items():
            found[self.part[number]] += self.sizes[number] if times == 1 else 0
        return {part: found[part] for part in PARTS}


@lru_cache(maxsize=256)
def rehearse(config: Config, precision: str, device: str) -> Rehearsal:
    """One step of `config` (micro_batch a number) on a `device` ("cpu", "cuda") that computes in `precision`."""
    shape, train = config.model, config.train
    tape = Tape(shape.vocab_size, train.rows * shape.context * shape.experts_per_token, shape.experts)
    grouped = precision == "bf16" and device == "cuda"
    machine = Machine(torch.device("cpu"), precision, compile=False, grouped_experts=grouped, peak_flops=None)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        model = fit(Transformer(shape, config.loss.chunk), machine, config.machine.checkpointing)
        ids_BT = torch.zeros(train.rows, shape.context + 1, dtype=torch.int64)
        load_LE = torch.zeros(len(shape.moe_layers), shape.experts)
    optimizer = optim.build(model, config.optim)
    parameters = list(model.parameters())
    with fake, tape:
        weights = tape.name("weights", [*parameters, *model.buffers()])
        _fill_gradients(parameters)
        optimizer.step()
        if train.accumulation == 1:
            optimizer.zero_grad(set_to_none=True)
        states = optimizer.state.values()
        state = tape.name("optimizer", [v for moments in states for v in moments.values() if isinstance(v, Tensor)])
        start = len(tape.events)
        tape.flops = 0
        _gradient(model, config, machine, tape, ids_BT, load_LE)
        gradients = tape.name("gradients", [p.grad for p in parameters if p.grad is not None])
        torch.nn.utils.clip_grad_norm_(parameters, config.optim.clip or torch.inf)
        optimizer.step()
    return Rehearsal(weights, gradients, state, tape.fullest(start), tape.flops)


def _gradient(model: Transformer, config: Config, machine: Machine, tape: Tape, ids_BT: Tensor, load_LE: Tensor) -> None:
    """One micro-batch of `train.accumulate`."""
    tape.forward = True
    with machine.autocast():
        nll_BT, routings = model(ids_BT[:, :-1], ids_BT[:, 1:])
    routing_L = stack(routings, like=load_LE)
    loss = objectives.share_of_step(nll_BT, routing_L.prob_E, routing_L.z, load_LE, config.tokens_per_step, 1.0, 1.0)
    tape.forward = False
    loss.backward()


def _kernel(operation: Any) -> Callable[..., Any]:
    """bitsandbytes' CPU kernel is Python that makes large temporaries, so it is run; other operations have shapes."""
    if operation.namespace == "bitsandbytes" and "update_8bit" in operation.name():
        return partial(operation._op_dk, torch._C.DispatchKey.CPU)
    return operation


def _fill_gradients(parameters: list[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)

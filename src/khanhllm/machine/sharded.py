"""What does not fit into one card: each process keeps a shard of every matrix, by PyTorch's FSDP2 (Zhao et al. 2023,
arXiv 2304.11277).

    forward, backward   a block's shards are brought together, used, and forgotten; its gradients are summed and cut
    update              shards -> owner, whole -> update -> shards

An update sees whole parameters, as in owners.py: so each optimizer stays what it is, Muon sees whole matrices, 8-bit
moments keep their blocks, and a step has the bits that it has without shards. The way to the owner and back is short
beside what each micro-batch moves. Vectors and routers are a thousandth of the memory and stay whole on all processes.

Gradients are summed after each micro-batch, not once a step: until then they would be whole on each card.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from khanhllm.machine.devices import Machine
from khanhllm.machine.group import Group, added
from khanhllm.machine.owners import FIRST, Owners, Shapes, Takers, in_buckets
from khanhllm.machine.precision import ROUNDED
from khanhllm.model import Transformer
from khanhllm.model.roles import role

DONE = -1
Bucket = list[tuple[nn.Parameter, int]]
"""parameters, and which process takes each"""
Result = TypeVar("Result")


class Sharded(Owners):
    """The owner of each parameter of a model that lies in shards.

    The optimizer's parameters are stand-ins: whole while their owner updates them, else of that shape but no memory.
    """

    waited_for = True

    def __init__(self, model: Transformer, machine: Machine) -> None:
        """Cut the model, which lies whole in the host's memory. One part of it after the other passes the card."""
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view")  # which nobody writes into
        named = dict(model.named_parameters())
        super().__init__(named.values(), machine.group)
        self.pairs = [(piece.parameter, piece.owner) for piece in self.pieces]
        self.model, self.mesh = model, self.group.mesh()
        self.parts = model.parts()
        self.gathers = [_Gather(self.group, nth) for nth in range(len(self.parts))]
        kept = {parameter for name, parameter in named.items() if role(name) not in ROUNDED}
        for part, gather in zip(self.parts, self.gathers, strict=True):
            stand_ins = [parameter for parameter in part.parameters() if parameter not in kept]
            _cut(part, gather, kept, machine)
            for parameter in stand_ins:
                _empty(parameter, machine.device)
        fully_shard(model, mesh=self.mesh, ignored_params=kept)
        register_fsdp_forward_method(model.head, "logits")
        for part, before in zip(self.parts, [self.parts[0], *self.parts], strict=False):
            # by default FSDP goes by the forwards that a process has seen, and the first process validates
            part.set_modules_to_backward_prefetch([before])  # type: ignore[operator]
            part.set_unshard_in_backward(part in model.blocks or part is model.head)  # type: ignore[operator]
        for parameter in kept:
            parameter.data = parameter.data.to(machine.device)
        pairs = zip(named.values(), model.parameters(), strict=True)
        self.shard = {whole: cut for whole, cut in pairs if cut is not whole}
        self.kept = [pair for pair in self.pairs if pair[0] in kept]
        model.register_load_state_dict_pre_hook(self._shard_all)
        with torch.no_grad(), machine.autocast():  # FSDP's first forward must be that of the whole
            model(torch.zeros(1, 1, dtype=torch.int64, device=machine.device))

    @torch.no_grad()
    def collect(self) -> None:
        """Bring each parameter's gradient, whose shards are sums already, to its owner."""
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p, _ in self.kept]
        for (parameter, _), total in zip(self.kept, self.group.sum(*found), strict=True):
            parameter.grad = total if parameter in self.mine else None
        for bucket in self._cut_buckets():
            shards = []
            for parameter, _ in bucket:
                cut = self.shard[parameter]
                shards.append(cut.grad.to_local())  # type: ignore[union-attr]
                cut.grad = None
            for parameter, gradient in self._united(bucket, shards):
                parameter.grad = gradient

    @torch.no_grad()
    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer update this process's parameters, which are whole meanwhile."""
        for bucket in self._cut_buckets():
            for parameter, whole in self._united(bucket, [self._local(parameter) for parameter, _ in bucket]):
                parameter.data = whole
        optimizer.step()
        for bucket in self._cut_buckets():
            for parameter, shard in self._divided(bucket):
                self._local(parameter).copy_(shard.view_as(self._local(parameter)))
                _empty(parameter, parameter.device)
        self.group.spread([parameter.data for parameter, _ in self.kept], [owner for _, owner in self.kept])

    @torch.no_grad()
    def weights(self, model: nn.Module, takers: Takers = FIRST) -> dict[str, Tensor]:
        """The same, whole and in the host's memory."""
        found, name_of = super().weights(model, takers), {whole: name for name, whole in self.named(model)}
        for bucket in _by_taker((parameter, takers.get(parameter, 0)) for parameter in self.shard):
            for parameter, whole in self._united(bucket, [self._local(parameter) for parameter, _ in bucket]):
                found[name_of[parameter]] = whole.cpu()
        return found

    def _shard_all(self, _model: nn.Module, weights: dict[str, Any], *_: Any) -> None:
        """Of weights that come whole, as from a checkpoint, take this process's part."""
        for name, parameter in self.named(self.model):
            if parameter in self.shard:
                cut, most = self.shard[parameter], self._rows(parameter)
                rows = weights[name][self.group.rank * most : (self.group.rank + 1) * most].to(cut.device)
                weights[name] = DTensor.from_local(rows, self.mesh, [Shard(0)], shape=cut.shape, stride=cut.stride())

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """The same of what lies whole on each process."""
        super().check({name: tensor for name, tensor in weights.items() if not isinstance(tensor, DTensor)})

    def named(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """The optimizer's parameters, by the names that they have in the model."""
        return ((name, pair[0]) for (name, _), pair in zip(model.named_parameters(), self.pairs, strict=True))

    def gathered(
        self,
        state: Mapping[Any, dict[str, Any]],
        shapes: Shapes,
        whole: Shapes | None = None,
        takers: Takers = FIRST,
    ) -> Mapping[Any, dict[str, Any]]:
        """The same, by the model's parameters."""
        found = super().gathered(state, shapes, whole, takers)
        return {self.shard.get(parameter, parameter): moments for parameter, moments in found.items()}

    def led(self, make: Callable[[], Result]) -> Result:
        """What `make` returns on the first process, which alone calls it. For what that asks of the model, the others
        bring their shards."""
        if self.group.leads:
            try:
                for gather in self.gathers:
                    gather.calls = True
                return self.group.told(make)
            finally:
                for gather in self.gathers:
                    gather.calls = False
                self.group.exchange(DONE)
        while (called := int(self.group.exchange(DONE)[0][0])) != DONE:
            part = self.parts[called]
            part.unshard()  # type: ignore[operator]
            part.reshard()  # type: ignore[operator]
        return self.group.told(make)

    def _cut_buckets(self) -> Iterator[Bucket]:
        """Parameters in shards and their owners, bucket by bucket."""
        return _by_taker(pair for pair in self.pairs if pair[0] in self.shard)

    def _local(self, parameter: nn.Parameter) -> Tensor:
        """This process's rows of a parameter."""
        return self.shard[parameter].to_local()  # type: ignore[attr-defined,no-any-return]

    def _rows(self, parameter: nn.Parameter) -> int:
        """Rows of a parameter on each process; the last ones may have fewer, or none."""
        return -(-len(parameter) // self.group.size)

    def _count(self, parameter: nn.Parameter, rank: int) -> int:
        """Numbers in the rows of a parameter that lie on a process."""
        most = self._rows(parameter)
        return max(0, min(most, len(parameter) - rank * most)) * (parameter.numel() // len(parameter))

    def _united(self, bucket: Bucket, shards: list[Tensor]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """The parameters that this process takes, whole, from the shards of all. A bucket says who takes which."""
        rows, whole = self._sizes(bucket)
        arrived = self.group.swap(torch.cat([shard.flatten() for shard in shards]), rows, whole)
        taken, ranks = self._taken(bucket), range(self.group.size)
        parts = arrived.split([self._count(parameter, rank) for rank in ranks for parameter in taken])
        for nth, parameter in enumerate(taken):
            yield parameter, torch.cat(parts[nth :: len(taken)]).view(parameter.shape)

    def _divided(self, bucket: Bucket) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """This process's numbers of each parameter in a bucket, from their owners, which have them whole."""
        rows, whole = self._sizes(bucket)
        taken, ranks = self._taken(bucket), range(self.group.size)
        split = [p.data.flatten().split([self._count(p, rank) for rank in ranks]) for p in taken]
        nothing = torch.empty(0, dtype=bucket[0][0].dtype, device=bucket[0][0].device)
        arrived = self.group.swap(torch.cat([nothing, *(part[rank] for rank in ranks for part in split)]), whole, rows)
        parts = arrived.split([self._count(parameter, self.group.rank) for parameter, _ in bucket])
        yield from zip((parameter for parameter, _ in bucket), parts, strict=True)

    def _taken(self, bucket: Bucket) -> list[nn.Parameter]:
        return [parameter for parameter, taker in bucket if taker == self.group.rank]

    def _sizes(self, bucket: Bucket) -> tuple[list[int], list[int]]:
        """Of what each process takes, the numbers that lie on this one; and of what this one takes, those on each."""
        ranks, own = range(self.group.size), self.group.rank
        rows = [sum(self._count(parameter, own) for parameter, taker in bucket if taker == rank) for rank in ranks]
        whole = [sum(self._count(parameter, rank) for parameter in self._taken(bucket)) for rank in ranks]
        return rows, whole


def _by_taker(held: Iterable[tuple[nn.Parameter, int]]) -> Iterator[Bucket]:
    """Parameters, each with who takes it, bucket by bucket; in each by taker, as the ranks' parts arrive."""
    return (sorted(bucket, key=itemgetter(1)) for bucket in in_buckets(held))


def _cut(part: nn.Module, gather: "_Gather", kept: set[nn.Parameter], machine: Machine) -> None:
    """Cut all matrices of a part by rows (experts by experts). Blocks compute with shards that are rounded before they
    are sent, as autocast would round them after: half the bytes, the same bits."""
    half = machine.precision == "bf16" and hasattr(part, "attention")
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if half else None
    cut: FSDPModule = fully_shard(
        part,
        mesh=gather.group.mesh(),
        reshard_after_forward=True,
        ignored_params=kept,
        mp_policy=policy or MixedPrecisionPolicy(),
    )
    cut.set_gradient_divide_factor(1.0)  # a step's loss is a sum over all processes
    cut.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    cut.set_custom_all_gather(gather)  # type: ignore[arg-type]
    cut.set_custom_reduce_scatter(_SumInOrder(gather.group))  # type: ignore[arg-type]


def _empty(parameter: nn.Parameter, device: torch.device) -> None:
    """Keep the shape of a parameter, and no memory."""
    parameter.data = torch.empty((), dtype=parameter.dtype, device=device).expand(parameter.shape)


class _Communication:
    """As FSDP asks for it."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Communication):
    """Brings the shards of the nth part together."""

    def __init__(self, group: Group, nth: int) -> None:
        super().__init__(group)
        self.nth = nth
        self.calls = False
        """whether the others must be called to it: they do something else"""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        if self.calls:
            self.group.exchange(self.nth)
        return self.group.unite(output_tensor, input_tensor, async_op)


class _SumInOrder(_Communication):
    """Sums gradients in the order of the ranks, each process the part that it keeps; as many bytes as any other sum."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        sizes = [output_tensor.numel()] * self.group.size
        output_tensor.copy_(added(self.group.swap(input_tensor, sizes, sizes).split(sizes)))

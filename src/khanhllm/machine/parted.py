"""Who updates what, where each process holds a part of the experts (model/exchange.py). All else is as in owners.py."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from khanhllm.machine.devices import Machine
from khanhllm.machine.group import Move
from khanhllm.machine.owners import FIRST, Owners, Takers
from khanhllm.model.exchange import Exchange, lead, serve

Result = TypeVar("Result")


class Parted(Owners):
    """The owner of each parameter, and of each part of a stack of experts."""

    waited_for = True

    def __init__(self, model: nn.Module, machine: Machine, exchanges: Sequence[Exchange]) -> None:
        """exchanges: those of the model's mixture layers, in order."""
        super().__init__(model.parameters(), machine.group, machine.group.part.counts(model))
        self.machine, self.exchanges = machine, exchanges

    def led(self, make: Callable[[], Result]) -> Result:
        """What `make` returns on the first process, which alone calls it. For what that asks of the model, those who
        hold the other parts lend their experts."""
        group = self.group
        if group.leads:
            return group.told(lambda: lead(self.exchanges, make))
        if group.rank < group.parts:
            with self.machine.autocast():
                serve(self.exchanges)
        return group.told(make)

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """The same of what lies whole on each process."""
        super().check({name: tensor for name, tensor in weights.items() if not self.group.part.cuts(name)})

    def weights(self, model: nn.Module, takers: Takers = FIRST) -> dict[str, Tensor]:
        """The same of the whole model; stacks of experts, gathered one by one, on the CPU."""
        found, group = super().weights(model, takers), self.group
        for name, parameter in model.named_parameters():
            if group.part.cuts(name):
                taker = takers.get(parameter, 0)
                givers = [taker if nth == taker % group.parts else nth for nth in range(group.parts)]
                gives = group.rank in givers
                mine = parameter.detach().cpu() if gives else torch.empty(parameter.shape, dtype=parameter.dtype)
                arrived = group.move([Move(mine, giver, taker) for giver in givers if giver != taker])
                if group.rank == taker:
                    arrived.insert(taker % group.parts, mine)
                    found[name] = torch.cat([part for part in arrived if part is not None])
        return found

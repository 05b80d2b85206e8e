"""Where the tokens of a forward went. A hook on each router reads its answer and changes nothing."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import nn

from khanhllm.model.router import Choice, Router

Route = list[list[tuple[int, float]]]
"""of one token: for each mixture layer its experts, the best first, and how much each one's answer counts"""


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Choice]]:
    """Within this context each router adds its choice to the list, a lower layer before a higher one."""
    chosen: list[Choice] = []
    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, Router):
                hook = module.register_forward_hook(lambda _router, _inputs, output: chosen.append(output[0]))
                hooks.callback(hook.remove)
        yield chosen


def routes(chosen: Sequence[Choice], rows: int) -> list[list[Route]]:
    """The routes of each token of each row of one forward. An expert that counts for nothing is left out."""
    layers = [
        [
            [(expert, weight) for expert, weight in zip(experts, weights, strict=True) if weight]
            for experts, weights in zip(choice.expert_TK.tolist(), choice.weight_TK.tolist(), strict=True)
        ]
        for choice in chosen
    ]
    tokens = [list(route) for route in zip(*layers, strict=True)]
    each = len(tokens) // rows
    return [tokens[row * each : (row + 1) * each] for row in range(rows)]

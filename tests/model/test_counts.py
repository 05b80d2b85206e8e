import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import build, tiny
from khanhllm.model.counts import active_parameters, flops_per_token, total_parameters
from khanhllm.model.experts import GROUPED, LOOP


def test_tables_that_are_looked_up_cost_no_arithmetic():
    plain, tables = (build(tiny(value_embedding=on, pair_embedding=64 * on)) for on in (False, True))
    assert flops_per_token(plain) == flops_per_token(tables)


@pytest.mark.parametrize("road", [LOOP, GROUPED], ids=["loop", "grouped"])
def test_the_flops_of_a_token_are_those_that_torch_counts(road):
    """Below the head, without attention, whose kernel on a CPU torch does not count, and norms, which are vectors."""
    model = build(tiny())
    model.blocks[1].feedforward.experts.backend = road
    with FlopCounterMode(display=False) as counter:
        x, (routing,) = model.trunk(torch.randint(300, (2, 32)))
        (x.square().sum() + routing.z).backward()
    config = model.config
    attention = 12 * len(model.blocks) * config.dim * config.context
    norms = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 1)
    assert counter.get_total_flops() / 64 == flops_per_token(model) - attention - 6 * (
        norms + model.head.weight.numel()
    )


def test_active_counts_only_the_chosen_experts():
    model = build(tiny())
    experts = total_parameters(model.blocks[1].feedforward.experts)
    assert active_parameters(model) == total_parameters(model) - experts // 2

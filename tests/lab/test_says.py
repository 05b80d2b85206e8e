"""What an expert adds, and which tokens that raises."""

import numpy as np
import pytest
import torch

from conftest import build, plain_machine, tiny
from khanhllm.lab.says import answers, says

IDS = np.random.default_rng(0).integers(0, 300, (6, 17))


@pytest.mark.parametrize("style", ["modern", "classic"])
def test_answers_of_all_tokens_add_up_to_what_the_mixture_adds(style):
    model = build(tiny(style, pattern="DMM"), seed=1)
    added, loads = {}, {}

    def keep(layer):
        def hook(_moe, _inputs, output):
            added[layer], loads[layer] = output[0].sum((0, 1)), output[1][0].load_E

        return hook

    for layer in (1, 2):
        model.blocks[layer].feedforward.register_forward_hook(keep(layer))
    for layer, answer_ED in zip((1, 2), answers(model, IDS, plain_machine()), strict=True):
        assert torch.allclose(loads[layer] @ answer_ED, added[layer], atol=1e-4)


def test_an_expert_that_adds_the_vector_of_a_token_says_that_token():
    model = build(tiny(), seed=1)
    often = np.repeat(np.arange(40), 25)
    answer_ED = torch.zeros(4, 32)
    answer_ED[0], answer_ED[1], answer_ED[2] = model.head.weight[[7, 30, 200]].detach()
    found = says(model, answer_ED, often)
    assert found[0][0] == 7 and found[1][0] == 30
    assert all(token < 40 for row in found for token in row)  # 200 was never seen


def test_the_hooks_are_gone_afterwards():
    model = build(tiny(), seed=1)
    answers(model, IDS, plain_machine())
    assert not model.blocks[1].feedforward.experts._forward_hooks

"""What an expert says: the vector that it adds to its tokens, put through the head, makes some tokens likelier (the
logit lens, nostalgebraist 2020; for feed-forward layers Geva et al. 2022, arXiv 2203.14680).

It is what the vector would do if nothing came after it: layers above read it too, and may turn it into something else.
"""

from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from khanhllm.lab.closing import losses
from khanhllm.lab.routing import OFTEN
from khanhllm.machine.devices import Machine
from khanhllm.model import Transformer
from khanhllm.model.router import Choice


@torch.inference_mode()
def answers(model: Transformer, ids: np.ndarray, machine: Machine) -> list[Tensor]:
    """For each mixture layer, what each expert adds to one of its tokens, on average: (E, D), fp32. 0 for an expert
    without tokens."""
    experts, dim = model.config.experts, model.config.dim
    sum_LED = [torch.zeros(experts, dim) for _ in model.config.moe_layers]
    tokens_LE = [torch.zeros(experts) for _ in model.config.moe_layers]

    def keep(nth: int) -> Any:
        def hook(stack: nn.Module, inputs: tuple[Tensor, Choice, Tensor], _output: Tensor) -> None:
            x_TD, choice, load_E = inputs
            for expert in range(experts):
                alone = choice._replace(weight_TK=choice.weight_TK.masked_fill(choice.expert_TK != expert, 0))
                sum_LED[nth][expert] += stack.forward(x_TD, alone, load_E).float().sum(0).cpu()
            tokens_LE[nth] += load_E.cpu()

        return hook

    with ExitStack() as hooks:
        for nth, layer in enumerate(model.config.moe_layers):
            mixture: Any = model.blocks[layer].feedforward
            hooks.callback(mixture.experts.register_forward_hook(keep(nth)).remove)
        losses(model, ids, machine)
    return [sum_ED / tokens_E.clamp_min(1)[:, None] for sum_ED, tokens_E in zip(sum_LED, tokens_LE, strict=True)]


@torch.inference_mode()
def says(model: Transformer, answer_ED: Tensor, ids: np.ndarray, most: int = 8) -> list[list[int]]:
    """For each expert, the tokens that its answer raises most above the mean of its layer's experts, the most first;
    among tokens that the sample has often, since nothing has taught the head the others."""
    head = model.head
    own_ED = answer_ED - answer_ED.mean(0)
    scale_D: Any = head.norm.weight
    raised_EV = (own_ED * scale_D.float().cpu()) @ head.weight.float().cpu().T
    raised_EV -= raised_EV.mean(1, keepdim=True)
    count_V = np.bincount(ids.ravel(), minlength=raised_EV.shape[1])
    raised_EV[:, torch.from_numpy(count_V < OFTEN)] = 0
    order_EM = raised_EV.topk(min(most, raised_EV.shape[1]), dim=1).indices.tolist()
    return [[v for v in order_M if raised_V[v] > 0] for raised_V, order_M in zip(raised_EV, order_EM, strict=True)]

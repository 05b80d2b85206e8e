"""What the experts of a run do: which tokens they get, how much of that is luck, and what they are worth.

One pass over a sample records where each token went; routing.py measures that. Then the same windows are read again,
once for each expert that is closed or taken away and for each mixture that is switched off: statistics of a routing do
not tell what an expert is worth. The result is one dict: experts.json in the run, a table and a picture (rooms.py).
"""

import copy
import json
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

from khanhllm.errors import UserError
from khanhllm.files import publish
from khanhllm.lab import closing, routing
from khanhllm.lab.closing import Cost
from khanhllm.lab.kinds import KINDS, kinds, shown
from khanhllm.lab.sample import Sample
from khanhllm.lab.says import answers, says
from khanhllm.machine.devices import Machine
from khanhllm.model import Transformer
from khanhllm.model.router import Choice, Router, Routing
from khanhllm.runs.run import FINDINGS, Run, find_checkpoint
from khanhllm.training import checkpoint

VERSION = 1
EVERY = 4
"""one window in so many is read again for each change"""
WORTHLESS = 0.005
"""share of the bits that a mixture must be worth"""


class Record(NamedTuple):
    """Where each token of a sample went, and what it cost."""

    expert_LWTK: np.ndarray
    opinion_L: list[float]
    """mean entropy of the router's probabilities, as a share of that of an even router"""
    nats_W: Tensor


def record(model: Transformer, sample: Sample, machine: Machine) -> Record:
    """Read the windows once and keep every choice."""
    layers, shape = model.config.moe_layers, model.config
    chosen: list[list[Tensor]] = [[] for _ in layers]
    entropy = [0.0] * len(layers)

    def keep(nth: int) -> Any:
        def hook(router: Router, inputs: tuple[Any, ...], output: tuple[Choice, Routing]) -> None:
            chosen[nth].append(output[0].expert_TK.to(torch.int16).cpu())
            with torch.autocast(inputs[0].device.type, enabled=False):
                x_TD = inputs[0][~inputs[2]] if len(inputs) > 2 else inputs[0]  # without what fills a row
                log_TE = F.linear(x_TD.float(), router.weight.float()).log_softmax(-1)
            entropy[nth] -= (log_TE.exp() * log_TE).sum().item()

        return hook

    with ExitStack() as hooks:
        for nth, layer in enumerate(layers):
            hooks.callback(closing.router_of(model, layer).register_forward_hook(keep(nth)).remove)
        nats_W = closing.losses(model, sample.ids, machine, sample.reading)
    windows, length = sample.text_WT.shape
    expert_LWTK = torch.stack([torch.cat(parts) for parts in chosen]).view(len(layers), windows, length, -1).numpy()
    most = int(sample.text_WT.sum()) * math.log(shape.experts)
    return Record(expert_LWTK, [total / most if most else 1.0 for total in entropy], nats_W)


def wanted(text: str, layers: list[int], experts: int) -> dict[int, list[int]]:
    """Which experts of which layers to close: all, none or LAYER:EXPERT,... Raises UserError, also for a dense run."""
    if not layers:
        raise UserError("this run is dense: it has no experts (model.pattern has no M)")
    if text in ("all", "none"):
        return {layer: list(range(experts)) if text == "all" else [] for layer in layers}
    chosen: dict[int, list[int]] = {layer: [] for layer in layers}
    for pair in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,4}):(\d{1,4})\s*", pair, re.ASCII)
        layer, expert = map(int, found.groups()) if found else (-1, -1)
        if layer not in chosen or expert >= experts:
            places = ", ".join(map(str, layers))
            raise UserError(
                f"--ablate: {pair.strip()[:30]!r} is no expert; write all, none or LAYER:EXPERT,..., with layers "
                f"{places} and experts 0 to {experts - 1}"
            )
        if expert not in chosen[layer]:
            chosen[layer].append(expert)
    return chosen


def examine(
    opened: Run, sample: Sample, ablate: str = "all", earlier: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Everything that the laboratory knows of a run, as it goes to experts.json. Raises UserError for a dense run."""
    shape = opened.config.model
    close = wanted(ablate, shape.moe_layers, shape.experts)
    found = record(opened.model, sample, opened.machine)
    layers = [_layer(opened, sample, found, nth) for nth in range(len(shape.moe_layers))]
    _add_words(opened, sample, layers)
    _add_costs(opened, sample, layers, close if ablate != "none" else {}, console)
    if earlier:
        _add_checkpoints(opened, sample, found, layers)
    sizes = sample.bytes_W(opened.tokenizer.token_bytes).sum()
    return {
        "version": VERSION,
        "step": opened.step,
        "checkpoint": opened.identity,
        "data": sample.source,
        "parts": sample.parts,
        "tokens": int(sample.text_WT.sum()),
        "tokens_ablated": int(_again(sample).text_WT.sum()),
        "bits_per_byte": found.nats_W.sum().item() / math.log(2) / max(int(sizes), 1),
        "experts_per_token": shape.experts_per_token,
        "layers": layers,
    }


def _layer(opened: Run, sample: Sample, found: Record, nth: int) -> dict[str, Any]:
    """One layer without what it is worth."""
    experts = opened.config.model.experts
    text_WT = sample.text_WT
    expert_NK = found.expert_LWTK[nth][text_WT].astype(np.int64)
    first_N, tokens_N = expert_NK[:, 0], sample.ids[:, :-1][text_WT]
    kind_N = kinds(opened.tokenizer)[tokens_N]
    lift_XE = routing.lifts(kind_N, expert_NK, experts, len(KINDS))
    part_N = np.repeat(sample.part_W, text_WT.sum(1))
    part_XE = routing.lifts(part_N, expert_NK, experts, len(sample.parts))
    liked = routing.likes(tokens_N, first_N, experts)
    shares, first = routing.shares(expert_NK, experts), routing.shares(first_N, experts)
    one_of = [
        {
            "expert": expert,
            "share": shares[expert],
            "share_first": first[expert],
            "likes": [shown(opened.tokenizer, token) for token in liked[expert]],
            "kinds": _largest(KINDS, lift_XE[:, expert]),
            "parts": _largest(sample.parts, part_XE[:, expert]) if len(sample.parts) > 1 else [],
        }
        for expert in range(experts)
    ]
    together_EE = routing.together(expert_NK, experts)
    return {
        "layer": opened.config.model.moe_layers[nth],
        "experts": one_of,
        "measures": dict(_measures(sample, found, nth, together_EE, kind_N, part_N)),
        "together": together_EE.tolist(),
    }


def _measures(
    sample: Sample, found: Record, nth: int, together_EE: np.ndarray, kind_N: np.ndarray, part_N: np.ndarray
) -> Iterator[tuple[str, dict[str, float]]]:
    text_WT, ids, expert_WTK = sample.text_WT, sample.ids, found.expert_LWTK[nth].astype(np.int64)
    first_WT, per_token, experts = expert_WTK[:, :, 0], expert_WTK.shape[2], len(together_EE)
    first_N, tokens_N, later_WT = first_WT[text_WT], ids[:, :-1][text_WT], text_WT[:, 1:]
    measures: dict[str, routing.Measure | None] = {
        "opinion": routing.Measure(found.opinion_L[nth], 1.0),
        "token": routing.known(tokens_N, first_N, experts),
        "previous": routing.known(ids[:, :-2][later_WT], first_WT[:, 1:][later_WT], experts),
        "next": routing.known(ids[:, 1:][text_WT], first_N, experts),
        "kind": routing.known(kind_N, first_N, experts),
        "position": routing.known(sample.place_WT[text_WT], first_N, experts),
        "part": routing.known(part_N, first_N, experts) if len(sample.parts) > 1 else None,
        "below": routing.known(found.expert_LWTK[nth - 1, :, :, 0][text_WT], first_N, experts) if nth else None,
        "faithful": routing.faithful(tokens_N, first_N, experts),
        "repetition": routing.repetition(first_WT, experts, text_WT),
    }
    if per_token > 1:
        measures["together"] = routing.Measure(float(together_EE.max()), (per_token - 1) / max(experts - 1, 1))
    for name, measure in measures.items():
        if measure:
            yield name, measure._asdict()


def _largest(names: list[str], lift_X: np.ndarray, most: int = 2) -> list[tuple[str, float]]:
    """The names with the largest lifts, if they are clearly above 1."""
    order = [x for x in np.argsort(-np.nan_to_num(lift_X)).tolist() if lift_X[x] > 1.2]
    return [(names[x], float(lift_X[x])) for x in order[:most]]


def _again(sample: Sample) -> Sample:
    """The windows that are read again for each change."""
    every = EVERY if len(sample.ids) >= 2 * EVERY else 1
    return sample._replace(ids=sample.ids[::every], part_W=sample.part_W[::every])


def _add_words(opened: Run, sample: Sample, layers: list[dict[str, Any]]) -> None:
    """Put the tokens that each expert's answer makes likelier into the layers."""
    found = answers(opened.model, _again(sample), opened.machine)
    for layer, answer_ED in zip(layers, found, strict=True):
        words = says(opened.model, answer_ED, sample.ids)
        for one, tokens in zip(layer["experts"], words, strict=True):
            one["says"] = [shown(opened.tokenizer, token) for token in tokens]


def _add_costs(
    opened: Run, sample: Sample, layers: list[dict[str, Any]], close: dict[int, list[int]], console: Console | None
) -> None:
    """Put what each expert and each mixture is worth into the layers."""
    if not close:
        return
    again, model = _again(sample), opened.model
    before_W = _losses(opened, again)
    whole = {"off": closing.off(), "random": closing.at_random(), "first": closing.first_only()}
    if opened.config.model.experts_per_token == 1:
        del whole["first"]
    jobs: list[tuple[dict[str, Any], str, int, closing.Change]] = []
    for layer in layers:
        nth = layer["layer"]
        jobs += [(layer, name, nth, change) for name, change in whole.items()]
        for expert in close[nth]:
            one = layer["experts"][expert]
            if len(layer["experts"]) > 1:
                jobs.append((one, "closed", nth, closing.close(expert)))
            jobs.append((one, "removed", nth, closing.remove(expert)))
    watched = console is not None and console.is_terminal
    for place, name, nth, change in track(jobs, "closing doors", console=console, transient=True, disable=not watched):
        with closing.changed(model, nth, change):
            after_W = _losses(opened, again)
        place[name] = closing.cost(before_W, after_W)._asdict()


def _add_checkpoints(opened: Run, sample: Sample, last: Record, layers: list[dict[str, Any]]) -> None:
    """Put into the layers how far each kept checkpoint agrees with the one opened."""
    run, model = opened.checkpoint.parents[1], copy.deepcopy(opened.model)
    experts = opened.config.model.experts
    for layer in layers:
        layer["saturation"] = {}
    for path in reversed(checkpoint.steps(run)):
        step = checkpoint.step_of(path)
        if step >= opened.step:
            continue
        try:
            checkpoint.load_model(find_checkpoint(run, opened.config, step), model)
        except (OSError, UserError):
            if path.exists():
                raise
            continue  # a training has removed it since
        then = record(model, sample, opened.machine).expert_LWTK
        for nth, layer in enumerate(layers):
            one_NK, other_NK = (who[nth][sample.text_WT] for who in (then, last.expert_LWTK))
            layer["saturation"][str(step)] = routing.overlap(one_NK, other_NK, experts)._asdict()


def worth(opened: Run, sample: Sample) -> dict[int, Cost]:
    """What it costs to switch off each mixture, by layer."""
    before_W = _losses(opened, sample)
    found: dict[int, Cost] = {}
    for layer in opened.config.model.moe_layers:
        with closing.changed(opened.model, layer, closing.off()):
            found[layer] = closing.cost(before_W, _losses(opened, sample))
    return found


def _losses(opened: Run, sample: Sample) -> Tensor:
    return closing.losses(opened.model, sample.ids, opened.machine, sample.reading)


def write(found: dict[str, Any], run: Path) -> Path:
    """Put experts.json into the run. Raises UserError."""
    path = run / FINDINGS
    try:
        publish(path, json.dumps(found, indent=1))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return path

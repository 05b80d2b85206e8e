"""nanochat's model on the same text, tokens, conversations and seconds as a run of ours.

    khanhllm train micro --data books/ --for 480s --run runs/base
    khanhllm tune runs/base --data chats.jsonl --run runs/talks
    python benchmarks/beside_nanochat.py NANOCHAT runs/base [runs/talks] > benchmarks/results/beside-nanochat.json

NANOCHAT is a checkout of github.com/karpathy/nanochat. Its model and optimizer are used as they are, and compiled
before the clock runs. Its base reads the rows of our base run, in the same order, as many a step, and for as many
seconds. Rates, momentum and weight decay are those of its scripts/base_train.py, which lowers rates for small batches.
As ours are far from those it was made for, `--rates as-they-are` leaves rates and takes no weight decay. Its chat part
reads the rows of our conversations, for as many seconds as ours took, by its own recipe too: the optimizer goes on, at
0.8 of its rates, straight down to 0 over the last half; a row is read as one text, and only answers count. Both models
are asked the answers that ours held out: nats a token, each conversation alone, and how many of 200 answers, the
likeliest token each time, end.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import khanhllm
from khanhllm.data.counting import Marks, counted
from khanhllm.data.shards import Shards
from khanhllm.lab import talks
from khanhllm.log.compare import read
from khanhllm.runs.evaluate import held_out
from khanhllm.runs.run import Run

Done = Callable[[int], float]
"""the share of a run that is over after so many steps"""
ROWS, ANSWERS, MOST = 16, 200, 10**6
BATCH, HORIZON, DECAY = 2**19, 12 * 110_100_000, 0.28
"""nanochat's recipe was found at so many tokens a step and so many in all, with this weight decay"""
RATES = {"unembedding_lr": 0.008, "embedding_lr": 0.3, "scalar_lr": 0.5, "matrix_lr": 0.02}
WARMUP, DECAYING, FLOOR = 40, 0.65, 0.05
"""steps; the share of the run in which rates go down, and to what"""
PARTS = ("values", "gates", "smear", "embedding", "scales", "backout")
"""of nanochat's model, that can be left out"""


def batches(run: Run, marks: Marks | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets as `run` read them, without what it replayed; of conversations, -1 for what does not count."""
    train = run.config.train
    rows = Shards.open(run.data, "train", run.config.model.context).rows_from(0, train.seed, Event())
    while True:
        ids = np.stack([next(rows) for _ in range(train.rows_per_step)]).astype(np.int64)
        targets = ids[:, 1:].copy()
        if marks:
            targets[~counted(ids, marks)] = -1
        yield torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(targets)


def train(step: Any, optimizer: Any, data: Iterator[tuple[Tensor, Tensor]], done: Done, prepare: Any) -> list[float]:
    """Take steps until all is done; returns their losses. prepare(group, share, steps): set the keys of a group of
    parameters after this share of the run and so many steps."""
    losses: list[float] = []
    while (share := done(len(losses))) < 1:
        for group in optimizer.param_groups:
            prepare(group, share, len(losses))
        loss = step(*next(data))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if len(losses) % 100 == 0:
            print(f"step {len(losses)}, {share:.0%} of the run", file=sys.stderr)
    return losses


def by_time(seconds: float) -> Done:
    started = time.perf_counter()
    return lambda steps: (time.perf_counter() - started) / seconds


def leave_out(model: Any, optimizer: Any, names: list[str]) -> None:
    """Let parts of the model begin at nothing, and stay there: scales of the stream at 1, gates half open."""
    gates = [block.attn.ve_gate for block in model.transformer.h]
    parts = {
        "values": [*model.value_embeds.parameters()],
        "gates": [gate.weight for gate in gates if gate is not None],
        "smear": [model.smear_lambda, model.smear_gate.weight],
        "embedding": [model.x0_lambdas],
        "scales": [model.resid_lambdas],
        "backout": [model.backout_lambda],
    }
    for name in names:
        for parameter in parts[name]:
            parameter.requires_grad_(False).fill_(1.0 if name == "scales" else 0.0)
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]


@torch.inference_mode()
def nats(model: Any, pairs: list[tuple[list[int], list[int]]]) -> float:
    total, tokens = 0.0, 0
    for start in range(0, len(pairs), ROWS):
        group = pairs[start : start + ROWS]
        longest = max(len(before) + len(after) for before, after in group)
        ids = torch.zeros(len(group), longest, dtype=torch.long)
        targets = torch.full((len(group), longest - 1), -1)
        for row, (before, after) in enumerate(group):
            ids[row, : len(before) + len(after)] = torch.tensor(before + after)
            targets[row, len(before) - 1 : len(before) + len(after) - 1] = torch.tensor(after)
        logits = model(ids[:, :-1]).float()
        total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum").item()
        tokens += sum(len(after) for _, after in group)
    return total / tokens


@torch.inference_mode()
def ending(model: Any, questions: list[list[int]], end: int, special: set[int], tokens: int, context: int) -> float:
    """Share of answers that end with `end`, as they are written token by token, the likeliest each time."""
    ended = 0
    for start in range(0, len(questions), ROWS):
        texts = [list(ids) for ids in questions[start : start + ROWS]]
        alive = list(range(len(texts)))
        for _ in range(tokens):
            alive = [row for row in alive if len(texts[row]) < context]
            if not alive:
                break
            ids = torch.zeros(len(alive), max(len(texts[row]) for row in alive), dtype=torch.long)
            for nth, row in enumerate(alive):
                ids[nth, : len(texts[row])] = torch.tensor(texts[row])
            logits = model(ids)
            said = {row: int(logits[nth, len(texts[row]) - 1].argmax()) for nth, row in enumerate(alive)}
            for row, token in said.items():
                texts[row].append(token)
            alive = [row for row, token in said.items() if token not in special]
        ended += sum(text[-1] == end for text in texts)
    return ended / len(questions)


def rehearse(model: Any, step: Any, optimizer: Any, batch: tuple[Tensor, Tensor]) -> None:
    """Take one step, so that all is compiled, and undo it."""
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    step(*batch).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for part, was in zip((model, optimizer), before, strict=True):
        part.load_state_dict(was)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("nanochat", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("talks", type=Path, nargs="?")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, help="so many, instead of the time of RUN")
    parser.add_argument("--without", nargs="+", default=[], choices=PARTS, help="parts of its model to leave out")
    parser.add_argument("--rates", choices=["by-batch", "as-they-are"], default="by-batch")
    options = parser.parse_args()
    os.environ.setdefault("NANOCHAT_DTYPE", "float32")
    sys.path.insert(0, str(options.nanochat))
    from nanochat.gpt import GPT, GPTConfig

    base = khanhllm.load(options.base)
    torch.set_num_threads(base.config.machine.threads or torch.get_num_threads())
    context = base.config.model.context
    config = GPTConfig(
        sequence_len=context,
        vocab_size=base.config.model.vocab_size,
        n_layer=options.layers,
        n_head=options.width // 64,
        n_kv_head=options.width // 64,
        n_embd=options.width,
        window_pattern="L",
    )
    torch.manual_seed(0)
    model = GPT(config)
    model.init_weights()
    scale, decay = 1.0, 0.0
    if options.rates == "by-batch":
        scale = (base.config.tokens_per_step / BATCH) ** 0.5
        decay = DECAY * scale * HORIZON / (base.step * base.config.tokens_per_step)
    with contextlib.redirect_stdout(sys.stderr):  # it tells its rates
        rates = {name: scale * rate for name, rate in RATES.items()}
        step, optimizer = torch.compile(model, dynamic=False), model.setup_optimizer(**rates)

    def prepare(group: dict[str, Any], share: float, steps: int) -> None:
        fall = max(0.0, share - 1 + DECAYING) / DECAYING
        group["lr"] = group["initial_lr"] * min((steps + 1) / WARMUP, 1 - (1 - FLOOR) * fall)
        if group["kind"] == "muon":
            group["momentum"] = 0.85 + 0.12 * steps / 400 if steps < 400 else 0.97 - 0.07 * fall
            group["weight_decay"] = decay * 0.5 * (1 + math.cos(math.pi * share))

    seconds = float(read(options.base).seconds[-1])
    leave_out(model, optimizer, options.without)
    rehearse(model, step, optimizer, next(batches(base, None)))
    done = (lambda steps: steps / options.steps) if options.steps else by_time(seconds)
    losses = train(step, optimizer, batches(base, None), done, prepare)
    windows = [window for window in held_out(base).windows() if len(window) == context + 1]
    size, total = 0, 0.0
    with torch.inference_mode():
        for window in windows:
            ids = torch.from_numpy(window)[None]
            total += model(ids[:, :-1], ids[:, 1:], loss_reduction="sum").item()
            size += int(base.tokenizer.token_bytes[window[1:]].sum())
    found = {
        "seconds": [seconds],
        "khanhllm": {
            "parameters": sum(weight.numel() for weight in base.model.parameters()),
            "steps": [base.step],
            "base_bits_per_byte": base.score_windows(iter(windows))["val_bpb"],
        },
        "nanochat": {
            "width": options.width,
            "layers": options.layers,
            "rates": options.rates,
            "without": options.without,
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "steps": [len(losses)],
            "loss": sum(losses[-100:]) / len(losses[-100:]),
            "base_bits_per_byte": total / math.log(2) / size,
        },
    }
    if options.talks:
        for group in optimizer.param_groups:
            group["initial_lr"] /= scale
        add_talks(found, options.talks, model, step, optimizer)
    print(json.dumps(found, indent=1))


def add_talks(found: dict[str, Any], path: Path, model: Any, step: Any, optimizer: Any) -> None:
    """Teach nanochat's model the conversations of our run in `path`, and ask both what was held out."""
    tuned = khanhllm.load(path)
    context, marks = tuned.config.model.context, Marks.of(tuned.tokenizer)
    pairs = list(talks.held_out_answers(tuned))
    before = nats(model, pairs)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0

    def prepare(group: dict[str, Any], share: float, steps: int) -> None:
        group["lr"] = group["initial_lr"] * 0.8 * min(1.0, 2 * (1 - share))
        if group["kind"] == "muon":
            group["momentum"] = 0.85 + 0.1 * min(1.0, steps / 300)

    seconds = float(read(path).seconds[-1])
    rehearse(model, step, optimizer, next(batches(tuned, marks)))
    losses = train(step, optimizer, batches(tuned, marks), by_time(seconds), prepare)
    asked, longest = pairs[:ANSWERS], max(len(right) for _, right in pairs[:ANSWERS])
    special = set(tuned.tokenizer.special_ids)
    found["seconds"].append(seconds)
    found["nanochat"]["steps"].append(len(losses))
    found["nanochat"] |= {
        "answer_nats_before": before,
        "answer_nats": nats(model, pairs),
        "answers_end": ending(model, [ids for ids, _ in asked], marks.end, special, talks.LONGER * longest, context),
    }
    own_nats, own_tokens, own_ends, _ = talks.answers(tuned, MOST)
    found["khanhllm"]["steps"].append(tuned.step)
    found["khanhllm"] |= {
        "answer_nats": float(own_nats.sum() / own_tokens.sum()),
        "answers_end": float(np.mean(own_ends[:ANSWERS])),
    }


if __name__ == "__main__":
    main()

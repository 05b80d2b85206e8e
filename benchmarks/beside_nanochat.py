"""nanochat's model on the same text, tokens, conversations and seconds as a run of ours.

    khanhllm train micro --data books/ --for 480s --run runs/base
    khanhllm tune runs/base --data chats.jsonl --run runs/talks
    python benchmarks/beside_nanochat.py NANOCHAT runs/base [runs/talks] > benchmarks/results/beside-nanochat.json

NANOCHAT is a checkout of github.com/karpathy/nanochat. Its model and optimizer are used as they are; its base reads the
rows of our base run, in the same order and for as many seconds, its chat part the rows of our conversations, for as
many seconds as ours took, with its own recipe: the optimizer goes on, at 0.8 of its rates, straight down to 0 over the
last half; a row is read as one text, and only answers count. Both models are asked the answers that ours held out:
nats a token, each conversation alone, and how many of 200 answers, the likeliest token each time, end.
"""

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
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

ROWS, ANSWERS, MOST = 16, 200, 10**6


def batches(shards: Shards, marks: Marks | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets; of conversations, -1 for what does not count."""
    rows = shards.rows_from(0, 0, Event())
    while True:
        ids = np.stack([next(rows) for _ in range(ROWS)]).astype(np.int64)
        targets = ids[:, 1:].copy()
        if marks:
            targets[~counted(ids, marks)] = -1
        yield torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(targets)


def train(step: Any, optimizer: Any, data: Iterator[tuple[Tensor, Tensor]], seconds: float, factor: Any) -> int:
    """Take steps until the time is over; returns how many."""
    started, steps = time.perf_counter(), 0
    while (share := (time.perf_counter() - started) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor(share)
        step(*next(data)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps += 1
        if steps % 100 == 0:
            print(f"step {steps}, {share:.0%} of the time", file=sys.stderr)
    return steps


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("nanochat", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("talks", type=Path, nargs="?")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
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
    with contextlib.redirect_stdout(sys.stderr):  # it tells its rates
        step, optimizer = torch.compile(model, dynamic=False), model.setup_optimizer()

    def factor(share: float) -> float:
        return min(1.0, share / 0.02 + 1e-3) * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))

    seconds = float(read(options.base).seconds[-1])
    rows = Shards.open(base.data, "train", context)
    step(*next(batches(rows, None))).backward()  # compiled before the clock runs
    optimizer.zero_grad(set_to_none=True)
    steps = train(step, optimizer, batches(rows, None), seconds, factor)
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
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "steps": [steps],
            "base_bits_per_byte": total / math.log(2) / size,
        },
    }
    if options.talks:
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

    def factor(share: float) -> float:
        return 0.8 * min(1.0, 2 * (1 - share))

    seconds = float(read(path).seconds[-1])
    steps = train(step, optimizer, batches(Shards.open(tuned.data, "train", context), marks), seconds, factor)
    asked, longest = pairs[:ANSWERS], max(len(right) for _, right in pairs[:ANSWERS])
    special = set(tuned.tokenizer.special_ids)
    found["seconds"].append(seconds)
    found["nanochat"]["steps"].append(steps)
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

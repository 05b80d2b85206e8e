"""The whole story, told as it happens: text, tokenizer, shards, a hybrid model that learns, and what it writes."""

import gzip
import math
import os
import sys
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from khanhllm import draw
from khanhllm.data.made import KINDS, write_made
from khanhllm.data.made import held_out as held_out_of
from khanhllm.data.render import render
from khanhllm.errors import UserError, missing_extra
from khanhllm.files import quoted
from khanhllm.inference.score import expert_load
from khanhllm.lab.talks import likeliest
from khanhllm.log.pictures import loss_curve_png, loss_curve_text
from khanhllm.runs.evaluate import held_out, score_opened
from khanhllm.runs.run import PYTHON, Run, open_run
from khanhllm.runs.talk import Talk
from khanhllm.runs.tune import tune
from khanhllm.schema import Config, Sampling
from khanhllm.settings import beside, preset, resolve
from khanhllm.training.run import train
from khanhllm.units import duration

MADE = 4000
"""conversations made by rule, from which `--chat` tunes"""
ASKED = 200


def tell(folder: Path, settings: Mapping[str, Any]) -> str:
    """Train the nano preset on the standard library's text and show the result. If `folder` holds a run, picks a new
    one. Returns the name of the signal that stopped the training; empty if none did."""
    folder = _free(folder)
    config = resolve(preset("nano"), settings, where="demo")
    console = Console(highlight=False)
    started = time.perf_counter()
    console.rule("[bold]KhanhLLM builds a small castle")
    console.print(_plan(config), markup=False)
    if stopped := train(config, folder):
        return stopped
    opened = open_run(folder, config.machine)
    opened.machine.take_process()
    console.rule("[bold]What it learned")
    _curve(console, folder)
    windows = list(held_out(opened).windows())
    if config.model.moe_layers:
        load_LE = expert_load(opened.model, windows[:64], opened.machine)
        console.print(draw.expert_table(load_LE, config.model.moe_layers))
    _verdict(console, opened, windows)
    console.rule("[bold]What it writes")
    _sample(console, opened)
    console.rule(f"[bold]Done in {(time.perf_counter() - started) / 60:.1f} minutes")
    console.print(
        NEXT.format(folder=folder, run=quoted(folder), steps=2 * config.train.steps), markup=False, soft_wrap=True
    )
    return ""


def talk(folder: Path, settings: Mapping[str, Any]) -> str:
    """Teach the run in `folder` to talk, from conversations made by rule, and let a person at the terminal try; if
    there is none yet, train it first. Returns the name of the signal that stopped it; empty if none did."""
    own = {key: value for key, value in settings.items() if key in ("machine", "log")}
    if (folder / "config.toml").exists():
        if idle := ", ".join(f"--{part}.{key}" for part in settings if part not in own for key in settings[part]):
            raise UserError(f"{folder} is trained already: {idle} would change nothing; take another --run")
    elif stopped := tell(folder, settings):
        return stopped
    out = _free(beside(folder, "-chat"))
    console = Console(highlight=False)
    started = time.perf_counter()
    console.rule("[bold]It learns to talk")
    chats = beside(out, ".jsonl")
    write_made(chats, MADE)
    config = tune(folder, out, str(chats), settings=own)
    if stopped := train(config, out, resume=True):
        return stopped
    opened = open_run(out, config.machine)
    opened.machine.take_process()
    console.rule("[bold]What it answers")
    _score_answers(console, opened)
    console.rule(f"[bold]Done in {(time.perf_counter() - started) / 60:.1f} minutes")
    console.print(f"To talk with it: khanhllm chat {quoted(out)}\n", markup=False, soft_wrap=True)
    if sys.stdin and sys.stdin.isatty() and console.is_terminal and "CI" not in os.environ:
        console.print(TRY, markup=False)
        Talk(opened, Sampling(temperature=0)).run()
    return ""


def _score_answers(console: Console, opened: Run) -> None:
    """Print how many of its answers to held-out conversations end, and how many are right."""
    kinds, conversations = zip(*held_out_of(ASKED, opened.config.data.validation), strict=True)
    wholes = [render(messages, opened.tokenizer) for messages in conversations]
    questions = [render(messages[:-1], opened.tokenizer, answer=True) for messages in conversations]
    said = likeliest(opened, questions, tokens=64)
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for kind, question, whole, answer in zip(kinds, questions, wholes, said, strict=True):
        right[kind].append(question + answer == whole)
    ended = sum(answer[-1:] == [opened.tokenizer.specials.get("<|end|>")] for answer in said)
    score = score_opened(opened)
    console.print(
        f"On conversations that it never read: {score['val_ce']:.3f} nats a token of the answers; "
        f"{ended} of {ASKED} answers end.",
        markup=False,
        soft_wrap=True,
    )
    for kind, found in right.items():
        console.print(f"  {kind:10} {sum(found):3} of {len(found)} right", markup=False)


def _free(folder: Path) -> Path:
    """The folder, or the first of folder-2, folder-3, ... that holds no run yet."""
    names = (folder if n == 1 else beside(folder, f"-{n}") for n in count(1))
    return next(name for name in names if not (name / "config.toml").exists())


def _plan(config: Config) -> str:
    model, train = config.model, config.train
    chance = f"{math.log(model.vocab_size):.1f}"
    stdlib = config.data.source == "stdlib"
    text = "the source code of\nthe Python that runs it" if stdlib else config.data.source
    length = f"{duration(train.seconds)}, in steps" if train.seconds else f"{train.steps:,} steps"
    return f"""\
A language model learns to guess the next piece of text. This one has
{len(model.pattern)} layers: dense ones, and mixtures of {model.experts} experts where a router sends each
piece to the best {model.experts_per_token}. It starts from nothing and reads {text}.

  1. a tokenizer learns {model.vocab_size:,} common pieces of text
  2. the text becomes shards of numbers; {config.data.validation:.0%} of the files are set aside
  3. the model learns for {length} of {config.tokens_per_step:,} tokens (a loss of {chance} is chance)
  4. it writes
"""


def _curve(console: Console, folder: Path) -> None:
    log, picture = folder / "training_log.csv", folder / "loss.png"
    console.print(loss_curve_text(log, min(console.width, 100), 14), markup=False, soft_wrap=True)
    try:
        loss_curve_png(log, picture, "KhanhLLM nano")
        console.print(f"\nThe same as a picture: {picture}\n", markup=False)
    except ModuleNotFoundError as error:
        console.print(f"\nNo picture of it: {missing_extra(error) or error}\n", markup=False)


def _verdict(console: Console, opened: Run, windows: list[np.ndarray]) -> None:
    """Print the bits per byte on files the model never saw, next to gzip's on the same bytes."""
    score = opened.score_windows(iter(windows))
    ids = np.concatenate([window[1:] for window in windows])
    text = opened.tokenizer.decode_bytes(ids[opened.tokenizer.token_bytes[ids] > 0])
    zipped = 8 * len(gzip.compress(text, 9)) / len(text)
    better = f"{1 - score['val_bpb'] / zipped:.0%} better" if score["val_bpb"] < zipped else "not yet better"
    console.print(
        f"On {score['val_bytes']:,} bytes of files it never saw: {score['val_bpb']:.3f} bits per byte.\n"
        f"gzip -9 needs {zipped:.3f}: the model is {better}.\n",
        markup=False,
    )


def _sample(console: Console, opened: Run) -> None:
    console.print(f"[dim]{escape(PYTHON)}[/]", end="")
    for piece in opened.stream(PYTHON, tokens=200):
        console.out(draw.visible(piece), end="", highlight=False)
    console.print("\n")


TRY = """\
It knows sums (What is 3 + 4?), copying (Say: red moon), capitals (Capital of Vietnam?),
and your name, if it is one of those it read (I am Anna. / Who am I?).
"""

NEXT = """\
{folder} holds the checkpoint, the tokenizer with a readable vocab.txt,
training_log.csv, samples.txt, loss.png, and config.toml, which reproduces the
run. Try next:

  khanhllm generate {run} --prompt "class Castle"
  khanhllm train --resume --run {run} --steps {steps}
  khanhllm train hour --data PATH        your own text, a better model, an hour
  khanhllm doctor {run}           is it healthy?
  khanhllm experts {run}          what does each expert do, and what is it worth?
  khanhllm lab facts              what do experts hold that a dense model does not?
"""

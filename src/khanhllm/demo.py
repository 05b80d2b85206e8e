"""The whole story, told as it happens: text, tokenizer, shards, a hybrid model that learns, and what it writes."""

import gzip
import math
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from khanhllm import draw
from khanhllm.errors import missing_extra
from khanhllm.inference.score import expert_load
from khanhllm.log.pictures import loss_curve_png, loss_curve_text
from khanhllm.runs.evaluate import held_out
from khanhllm.runs.run import Run, open_run
from khanhllm.schema import Config
from khanhllm.settings import preset, resolve
from khanhllm.training.run import train

PROMPT = "import os\nimport sys\n\n\ndef main("


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
    console.print(NEXT.format(run=folder, steps=2 * config.train.steps), markup=False, soft_wrap=True)
    return ""


def _free(folder: Path) -> Path:
    """The folder, or the first of folder-2, folder-3, ... that holds no run yet."""
    names = (folder if n == 1 else folder.with_name(f"{folder.name}-{n}") for n in count(1))
    return next(name for name in names if not (name / "config.toml").exists())


def _plan(config: Config) -> str:
    model, train = config.model, config.train
    chance = f"{math.log(model.vocab_size):.1f}"
    return f"""\
A language model learns to guess the next piece of text. This one has
{len(model.pattern)} layers: dense ones, and mixtures of {model.experts} experts where a router sends each
piece to the best {model.experts_per_token}. It starts from nothing and reads the source code of
the Python that runs it.

  1. a tokenizer learns {model.vocab_size:,} common pieces of text
  2. the text becomes shards of numbers; {config.data.validation:.0%} of the files are set aside
  3. the model learns for {train.steps:,} steps of {config.tokens_per_step:,} tokens (a loss of {chance} is chance)
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
    console.print(f"[dim]{escape(PROMPT)}[/]", end="")
    for piece in opened.stream(PROMPT, tokens=200):
        console.out(draw.visible(piece), end="", highlight=False)
    console.print("\n")


NEXT = """\
{run} holds the checkpoint, the tokenizer with a readable vocab.txt,
training_log.csv, samples.txt, loss.png, and config.toml, which reproduces the
run. Try next:

  khanhllm generate {run} --prompt "class Castle"
  khanhllm train --resume --run {run} --steps {steps}
  khanhllm train mini --data PATH        your own text, a larger model
  khanhllm doctor {run}           is it healthy?
  khanhllm experts {run}          what does each expert do, and what is it worth?
  khanhllm lab facts              what do experts hold that a dense model does not?
"""

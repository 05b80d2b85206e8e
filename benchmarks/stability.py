"""Is the recipe of `khanh-692m` stable? Its twin at a sixteenth of the width, one row a micro-batch, 64 accumulated.

    python benchmarks/stability.py DATA [--steps 200] [--seed 0] [--rows NAME ...] [--threads 1]

Learning rate, warm-up, optimizer, balance and depth are the preset's; a row is 256 tokens long. The rate stays at its
peak after the warm-up, as it does in the preset's first 200 of 100,000 steps. Matrices move faster as the width shrinks
(`optim.base_dim`), so that a step changes outputs as much as it does at full width. RunLog of each: the loss, rejected
steps, the longest gradient, the least share of any expert in any layer and step (12.5 % is even), the step from which
all stay above 2 %, and the largest excess over an even load (max-violation), for both halves of the run. Results go to
benchmarks/results/.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from khanhllm.log.pictures import read_log, with_loss
from khanhllm.log.run_log import FILE
from khanhllm.settings import preset, resolve
from khanhllm.training.run import train

SHAPE = {"dim": 64, "heads": 2, "hidden": 256, "context": 256, "vocab_size": 8192}
ROWS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "one rate at any width": {"optim": {"base_dim": 0}},
    "2,000 steps of warm-up": {"schedule": {"warmup": 2000}},
    "bias": {"model": {"router_bias": True}, "loss": {"balance": 0.001}},
    "nothing": {"loss": {"balance": 0.0}},
}
IDLE = 0.02
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", help="as for khanhllm train")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), metavar="NAME")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokenizer", default="", help="tokenizer.json of 8,192 tokens; trained if not given")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps: at least 2, one for each half of the run")
    for name in options.rows:
        told = {"row": name, "seed": options.seed, "steps": options.steps, **measured(name, options)}
        print(json.dumps(told), flush=True)
        path = RESULTS / f"stability-{name.replace(' ', '-')}-seed{options.seed}.json"
        path.write_text(json.dumps(told, indent=1) + "\n", "utf-8")


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train one row and sum up its log."""
    recipe = preset("khanh-692m")
    given = {
        "model": SHAPE,
        "data": {"source": options.data, "tokenizer": options.tokenizer},
        "train": {"steps": options.steps, "seed": options.seed, "eval_every": 0, "save_every": 0, "sample_tokens": 0},
        "optim": {"base_dim": recipe["model"]["dim"]},
        "schedule": {"kind": "wsd", "decay": 0.0},
        "machine": {"threads": options.threads, "checkpointing": "none"},
    }
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        train(resolve(recipe, given, ROWS[name]), run)
        log = read_log(run / FILE, ("loss", "rejected", "grad_norm", "least_share", "max_violation"))
    return {
        "loss_at_last": float(with_loss(log)["loss"][-20:].mean()),
        "rejected": int((log["rejected"] > 0).sum()),
        "longest_gradient": float(np.nanmax(log["grad_norm"])),
        "all_above_2_percent_from": int(np.flatnonzero(np.r_[0.0, log["least_share"]] < IDLE)[-1]) + 1,
        "least_share": [float(half.min()) for half in np.array_split(log["least_share"], 2)],
        "max_violation": [float(half.max()) for half in np.array_split(log["max_violation"], 2)],
        "least_share_of_each_step": log["least_share"].round(4).tolist(),
    }


if __name__ == "__main__":
    main()

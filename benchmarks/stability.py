"""Is the recipe of `khanh-692m` stable? Its twin at a sixteenth of the width, one row a micro-batch, 64 accumulated.

    python benchmarks/stability.py DATA [--steps 200] [--rows NAME ...] [--threads 1]

Learning rate, optimizer, balance and depth are the preset's; the warm-up is cut to 20 steps, so that 200 steps know the
full rate, and a row is 256 tokens long. Other rows balance the experts in another way. Told of each: the loss, rejected
steps, the longest gradient, and from step 100 on the least share of any expert and the largest excess over an even
load (max-violation). Results go to benchmarks/results/.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from khanhllm import train
from khanhllm.settings import preset, resolve
from khanhllm.step import train_step

SHAPE = {"dim": 64, "heads": 2, "hidden": 256, "context": 256, "vocab_size": 8192}
ROWS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "bias": {"model": {"router_bias": True}, "loss": {"balance": 0.001}},
    "bias alone": {"model": {"router_bias": True}, "loss": {"balance": 0.0}},
    "nothing": {"loss": {"balance": 0.0}},
    "ten times the rate": {"optim": {"lr": 3e-3}},
}
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", help="as for khanhllm train")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), metavar="NAME")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokenizer", default="", help="tokenizer.json of 8,192 tokens; trained if not given")
    options = parser.parse_args()
    for name in options.rows:
        told = {"row": name, "steps": options.steps, **measured(name, options)}
        print(json.dumps(told), flush=True)
        path = RESULTS / f"stability-{name.replace(' ', '-')}.json"
        path.write_text(json.dumps(told, indent=1) + "\n", "utf-8")


def measured(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Train one row through the very step, with its rows of the log at hand."""
    given = {
        "model": SHAPE,
        "data": {"source": options.data, "tokenizer": options.tokenizer},
        "train": {"steps": options.steps, "eval_every": 0, "save_every": 0, "sample_tokens": 0},
        "schedule": {"warmup": 20},
        "machine": {"threads": options.threads, "checkpointing": "none"},
    }
    rows: list[dict[str, Any]] = []

    def step(*given: Any) -> Any:
        state, row = train_step(*given)
        rows.append(row)
        return state, row

    real, train.train_step = train.train_step, step
    try:
        with tempfile.TemporaryDirectory() as folder:
            train.run(resolve(preset("khanh-692m"), given, ROWS[name]), Path(folder, "run"))
    finally:
        train.train_step = real
    late = [row["load_per_layer"] for row in rows[options.steps // 2 :]]
    return {
        "loss_at_last": statistics.fmean(row["loss"] for row in rows[-20:]),
        "rejected": sum(bool(row["fault"]) for row in rows),
        "longest_gradient": max(row["grad_norm"] for row in rows[20:]),
        "least_share": min(float(load_LE.min()) for load_LE in late),
        "max_violation": max(float(load_LE.max()) * load_LE.shape[1] - 1 for load_LE in late),
    }


if __name__ == "__main__":
    main()

"""What each rung of the precision ladder costs in loss: the same model, seed and data, 500 steps, against fp32.

    python benchmarks/precision_ladder.py [RUNG ...] [--steps 500] [--threads 1] [--seed 0]

"noise" is fp32 with the same rows in other micro-batches: its gap is what a change of rounding alone can do in one run.
"nearest" is the control: bf16 weights without stochastic rounding. Results go to benchmarks/results/.
"""

import argparse
import csv
import json
import platform
import statistics
import tempfile
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

from khanhllm.errors import UserError
from khanhllm.machine.devices import open_machine
from khanhllm.model.counts import on_paper, total_parameters
from khanhllm.optim import rounding
from khanhllm.schema import Config
from khanhllm.settings import resolve
from khanhllm.training.run import train

MODEL: dict[str, Any] = {
    "style": "modern",
    "pattern": "DMDM",
    "dim": 128,
    "heads": 4,
    "hidden": 512,
    "expert_hidden": 256,
    "context": 128,
    "vocab_size": 2048,
}
ROWS = 4
"""of `context` tokens a step, two in each micro-batch"""
LR = 3e-3
LAST = 50
"""steps whose mean training loss counts"""
RESULTS = Path(__file__).parent / "results"
HALVES = {"precision": "bf16", "weights": "bf16"}
RUNGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32, 8-bit states": {"optim": {"name": "adamw8bit"}},
    "tf32": {"machine": {"precision": "tf32"}},
    "bf16 autocast": {"machine": {"precision": "bf16"}},
    "bf16 weights": {"machine": HALVES, "optim": {"name": "adamw8bit"}},
    "bf16 weights and gradients": {"machine": HALVES | {"gradients": "bf16"}, "optim": {"name": "adamw8bit"}},
    "nearest": {"machine": HALVES, "optim": {"name": "adamw8bit"}},
    "noise": {"train": {"micro_batch": ROWS, "accumulation": 1}},
}


def rung_config(options: argparse.Namespace, settings: dict[str, Any]) -> Config:
    base = {
        "model": MODEL,
        "data": {"source": "stdlib", "validation": 0.05, "cache": str(options.cache)},
        "train": {
            "steps": options.steps,
            "micro_batch": 2,
            "accumulation": ROWS // 2,
            "seed": options.seed,
            "eval_every": 0,
        },
        "optim": {"lr": LR},
        "schedule": {"warmup": 50},
        "machine": {"precision": "fp32", "threads": options.threads},
        "log": {"every": 100},
    }
    quiet = {"train": {"save_every": 0, "sample_tokens": 0, "eval_tokens": 50_000}}
    return resolve(base, quiet, settings)


def climb(config: Config, nearest: bool) -> dict[str, float]:
    """Train one rung; its losses (nats per token) and seconds."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        control = patch.object(rounding, "round_stochastically_", lambda x, bits: x) if nearest else nullcontext()
        with control:
            train(config, Path(folder, "run"))
        with Path(folder, "run", "training_log.csv").open() as file:
            rows = list(csv.DictReader(file))
    loss = statistics.fmean(float(row["loss"]) for row in rows[-LAST:])
    return {"loss": loss, "val_ce": float(rows[-1]["val_ce"]), "seconds": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path("shards"), help="where prepared text is kept")
    parser.add_argument("rungs", nargs="*", metavar="RUNG", help=f"of {', '.join(RUNGS)}; all if none is named")
    options = parser.parse_args()
    report = facts(options)
    rungs: dict[str, dict[str, float]] = report["rungs"]
    for name in {"fp32": None} | dict.fromkeys(options.rungs or RUNGS):
        config = rung_config(options, RUNGS[name])
        try:
            open_machine(config.machine)
        except UserError as error:
            print(f"{name}: skipped ({error})")
            continue
        rungs[name] = climb(config, nearest=name == "nearest")
        for kind in ("loss", "val_ce"):
            rungs[name][f"{kind}_gap_percent"] = 100 * (rungs[name][kind] / rungs["fp32"][kind] - 1)
        path = RESULTS / f"precision-ladder-{report['machine']['device']}-seed{options.seed}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(rungs)
    print(f"written to {path}")


def facts(options: argparse.Namespace) -> dict[str, Any]:
    machine = open_machine(rung_config(options, {}).machine)
    parameters = total_parameters(on_paper(resolve({"model": MODEL}).model))
    return {
        "machine": {"device": machine.device.type, "what": machine.describe(), "platform": platform.platform()},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "bitsandbytes")},
        "shape": MODEL | {"parameters": parameters},
        "run": {"steps": options.steps, "tokens_per_step": ROWS * MODEL["context"], "seed": options.seed, "lr": LR},
        "rungs": {},
    }


def show(rungs: dict[str, dict[str, float]]) -> None:
    print(f"\n{'rung':28} {'train loss':>10} {'gap %':>7} {'validation':>10} {'gap %':>7} {'seconds':>8}")
    for name, row in rungs.items():
        train_part = f"{row['loss']:10.4f} {row['loss_gap_percent']:+7.2f}"
        print(f"{name:28} {train_part} {row['val_ce']:10.4f} {row['val_ce_gap_percent']:+7.2f} {row['seconds']:8.0f}")


if __name__ == "__main__":
    main()

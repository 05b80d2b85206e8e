"""What learns most in the same time: each row a recipe, trained for so many seconds, scored on text it never saw.

    python benchmarks/learning.py DATA [--seconds 480] [--seeds 1] [--rows NAME ...] [--score part|held-out]

DATA holds C4-format c4-train*.json.gz and c4-validation*.json.gz. A recipe is chosen by the part of the training files
that is held out of all trainings (--score part, the default) and reported on the validation files (--score held-out).
Rows that lost stay in the table: what does not help is worth knowing too.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from khanhllm import train
from khanhllm.compare import read
from khanhllm.evaluate import score_run
from khanhllm.settings import preset, resolve

ROWS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "swiglu": {"model": {"feedforward": "swiglu", "hidden": 256, "expert_hidden": 128}},
    "no value embedding": {"model": {"value_embedding": False}},
    "one rate for tables and the rest": {"optim": {"embedding_lr": 0}},
    "balance by loss alone": {"model": {"router_bias": False}, "loss": {"balance": 0.01}},
    "zero out": {"model": {"zero_out": True}},
    "half the rates": {"optim": {"muon_lr": 0.02, "lr": 0.015}},
    "head slower": {"optim": {"head_lr": 0.01}},
    "half the batch": {"train": {"micro_batch": 4}},
    "twice the batch": {"train": {"micro_batch": 16}},
    "width 64": {"model": {"dim": 64, "heads": 2, "hidden": 256, "expert_hidden": 128}},
    "width 128": {"model": {"dim": 128, "heads": 4, "hidden": 512, "expert_hidden": 256}},
    "width 160": {"model": {"dim": 160, "heads": 5, "hidden": 640, "expert_hidden": 320}},
    "six layers": {"model": {"pattern": "DMDMDM"}},
    "dense twin, equal arithmetic": {"model": {"pattern": "DDDD"}},
    "dense twin, equal parameters": {"model": {"pattern": "DDDD", "hidden": 960}},
    "AdamW": {"optim": {"name": "adamw", "lr": 0.003, "embedding_lr": 0}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), metavar="NAME")
    parser.add_argument("--score", choices=["part", "held-out"], default="part")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json of 8,192 tokens; trained if not given")
    parser.add_argument("--out", type=Path, default=Path("learning.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = [measured(name, options, Path(folder)) for name in options.rows]
    options.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def measured(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Bits per byte, tokens/s and steps of one row, for each seed."""
    runs = []
    for seed in range(options.seeds):
        run = folder / f"{name}-{seed}"
        given = {
            "data": {
                "source": f"{options.data}/c4-train*.json.gz",
                "tokenizer": str(options.tokenizer or ""),
                "cache": str(folder / "shards"),
                "validation": 0.02,
            },
            "train": {"seconds": options.seconds, "seed": seed, "save_every": 0, "eval_every": 0, "sample_tokens": 0},
        }
        train.run(resolve(preset("micro"), given, ROWS[name]), run)
        told = read(run)
        data = f"{options.data}/c4-validation*.json.gz" if options.score == "held-out" else None
        bits = score_run(run, data, told.config.machine)["val_bpb"]
        runs.append({"val_bpb": bits, "steps": int(told.step[-1]), "tokens_per_s": told.tokens[-1] / told.seconds[-1]})
    bits_of_all = [one["val_bpb"] for one in runs]
    row = {"row": name, "seconds": options.seconds, "runs": runs, "median": statistics.median(bits_of_all)}
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    main()

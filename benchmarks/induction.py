"""What does a start that can copy (model/induction.py) save, and which of its numbers matter?

    python benchmarks/induction.py DATA [--steps 400] [--seed 0] [--rows NAME ...] [--threads 1] [--out FILE]

DATA as for khanhllm train. Each row is a dense model of width 64 that learns with the recipe of `hour`, 4,096 tokens a
step: its bits per byte on held-out documents, and its training loss on the way, 50 steps each, in bits per byte too.
FILE is benchmarks/results/induction-seed0.json, or of the seed given.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from khanhllm.log.compare import read
from khanhllm.model import induction
from khanhllm.settings import preset, resolve
from khanhllm.training.run import train

SHAPE = {"pattern": "DDDD", "dim": 64, "heads": 2, "hidden": 512, "context": 256, "vocab_size": 2048}
BEFORE = {"token_shift": False, "value_every": 2}
"""keys that the preset had not yet, when these runs were made"""
TRAIN = {"micro_batch": 16, "eval_every": 0, "save_every": 0, "sample_tokens": 0, "eval_tokens": 2**18}
ROWS: dict[str, dict[str, float]] = {
    "without": {},
    "with": {},
    "nothing in common": {"COMMON": 0},
    "no gain": {"GAIN": 1},
    "half as much written": {"WRITTEN": 1},
    "twice as much written": {"WRITTEN": 4},
    "small token vectors": {"TOKEN": 0.08, "COMMON": 0.04},
}
"""numbers of model/induction.py that differ"""
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), metavar="NAME")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    path, found = options.out or RESULTS / f"induction-seed{options.seed}.json", {}
    for name in options.rows:
        with patch.dict(vars(induction), ROWS[name]):
            found[name] = measured(name != "without", options)
        print(name, json.dumps(found[name]), flush=True)
        told = {"data": Path(options.data).name, "steps": options.steps, "rows": found}
        path.write_text(json.dumps(told, indent=1) + "\n", "utf-8")


def measured(head: bool, options: argparse.Namespace) -> dict[str, Any]:
    given = {
        "model": SHAPE | BEFORE | {"induction_head": head},
        "data": {"source": options.data, "validation": 0.02},
        "train": TRAIN | {"steps": options.steps, "seed": options.seed},
        "schedule": {"warmup": 40},
        "machine": {"device": "cpu", "threads": options.threads},
    }
    with tempfile.TemporaryDirectory() as folder:
        train(resolve(preset("hour"), given), Path(folder, "run"))
        told = read(Path(folder, "run"))
    loss = np.asarray(told.loss, float)
    way = loss[: len(loss) // 50 * 50].reshape(-1, 50).mean(1) * told.bits_of_a_nat
    return {"bits_per_byte": float(told.bits[-1]), "on_the_way": [round(float(bits), 3) for bits in way]}


if __name__ == "__main__":
    main()

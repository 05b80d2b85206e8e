"""What learns most in the same time: each row a recipe, trained for so many seconds, scored on text it never saw.

    python benchmarks/learning.py DATA [--seconds 480] [--steps N] [--seeds 1] [--rows NAME ...] [--score part|held-out]

With --steps, all rows train for as many steps instead: what a change of equal cost is worth, on a machine that is not
quiet.

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

from khanhllm.log.compare import read
from khanhllm.runs.evaluate import score_opened
from khanhllm.runs.run import open_run
from khanhllm.settings import preset, resolve
from khanhllm.training.run import train

ROWS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "swiglu": {"model": {"feedforward": "swiglu", "hidden": 256, "expert_hidden": 128}},
    "no value embedding": {"model": {"value_embedding": False}},
    "no pairs": {"model": {"pair_embedding": 0}},
    "four times the pairs": {"model": {"pair_embedding": 65_536}},
    "no skips": {"model": {"embedding_skip": False}},
    "slow means": {"optim": {"beta1": 0.9}},
    "less slow means": {"optim": {"beta1": 0.6}},
    "slow momentum": {"optim": {"momentum": 0.95}},
    "two turns of Newton-Schulz": {"optim": {"newton_schulz": 2}},
    "Muon in 8 bits": {"optim": {"name": "muon8bit"}},
    "less decay": {"optim": {"weight_decay": 0.02}},
    "mixtures only": {"model": {"pattern": "MMMM"}},
    "mixtures last": {"model": {"pattern": "DDMM"}},
    "one mixture": {"model": {"pattern": "DDDM"}},
    "mixtures before dense layers": {"model": {"pattern": "MDMD"}},
    "4 experts": {"model": {"experts": 4}},
    "16 experts": {"model": {"experts": 16}},
    "16 small experts, top 4": {"model": {"experts": 16, "experts_per_token": 4, "expert_hidden": 96}},
    "twice the inner width": {"model": {"hidden": 768, "expert_hidden": 384}},
    "two heads": {"model": {"heads": 2}},
    "one rate for tables and the rest": {"optim": {"embedding_lr": 0}},
    "balance by loss alone": {"model": {"router_bias": False}, "loss": {"balance": 0.01}},
    "zero out": {"model": {"zero_out": True}},
    "half the rates": {"optim": {"muon_lr": 0.02, "lr": 0.015, "embedding_lr": 0.05}},
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
    parser.add_argument("--steps", type=int, help="instead of seconds")
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
    budget = {"steps": options.steps} if options.steps else {"seconds": options.seconds}
    for seed in range(options.seeds):
        run = folder / f"{name}-{seed}"
        given = {
            "data": {
                "source": f"{options.data}/c4-train*.json.gz",
                "tokenizer": str(options.tokenizer or ""),
                "cache": str(folder / "shards"),
                "validation": 0.02,
            },
            "train": {**budget, "seed": seed, "save_every": 0, "eval_every": 0, "sample_tokens": 0},
        }
        train(resolve(preset("micro"), given, ROWS[name]), run)
        told = read(run)
        data = f"{options.data}/c4-validation*.json.gz" if options.score == "held-out" else None
        bits = score_opened(open_run(run, told.config.machine), data)["val_bpb"]
        runs.append({"val_bpb": bits, "steps": int(told.step[-1]), "tokens_per_s": told.tokens[-1] / told.seconds[-1]})
    bits_of_all = [one["val_bpb"] for one in runs]
    row = {"row": name, **budget, "runs": runs, "median": statistics.median(bits_of_all)}
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    main()

"""Do learning rates carry over from small to large? Recipe `micro` at widths 128, 256 and 512, at three rates each.

    python benchmarks/widths.py DATA [--widths 128 256 512] [--factors 0.5 1 2] [--rule base_dim|none]

DATA as for khanhllm train. All rates are multiplied by the factor; with the rule `base_dim`, those of the matrices
under AdamW also follow the width. If the rule holds, the same factor is best, or nearly, at each width.
Results go to benchmarks/results/.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from khanhllm.log.compare import read
from khanhllm.settings import preset, resolve
from khanhllm.training.run import train

RESULTS = Path(__file__).parent / "results"
TRAIN = {"steps": 300, "micro_batch": 4, "eval_every": 0, "save_every": 0, "sample_tokens": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data")
    parser.add_argument("--widths", type=int, nargs="*", default=[128, 256, 512])
    parser.add_argument("--factors", type=float, nargs="*", default=[0.5, 1, 2])
    parser.add_argument("--rule", choices=["base_dim", "none"], default="base_dim")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokenizer", default="", help="tokenizer.json of 8,192 tokens; trained if not given")
    options = parser.parse_args()
    found = []
    for dim in options.widths:
        for factor in options.factors:
            found.append({"dim": dim, "factor": factor, "val_bpb": measured(dim, factor, options)})
            print(json.dumps(found[-1]), flush=True)
            path = RESULTS / f"widths-{options.rule}.json"
            path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def measured(dim: int, factor: float, options: argparse.Namespace) -> float:
    """Bits per byte of the held-out part."""
    recipe = preset("micro")
    rates = {key: recipe["optim"][key] * factor for key in ("lr", "muon_lr", "embedding_lr")}
    given: dict[str, Any] = {
        "model": {"dim": dim, "heads": dim // 32, "hidden": 2 * dim, "expert_hidden": dim},
        "data": {"source": options.data, "tokenizer": options.tokenizer, "validation": 0.02},
        "train": TRAIN,
        "optim": rates | {"base_dim": 96 if options.rule == "base_dim" else 0},
        "machine": {"threads": options.threads},
    }
    with tempfile.TemporaryDirectory() as folder:
        train(resolve(recipe, given), Path(folder, "run"))
        return float(read(Path(folder, "run")).bits[-1])


if __name__ == "__main__":
    main()

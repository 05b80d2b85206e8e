"""Does pre-training learn more if documents in one row do not see each other (`train.document_mask`)?

    python benchmarks/document_mask.py DATA [--preset micro] [--steps 600] [--seeds 3] [--windows 400] [--threads 1]

Each seed trains twice, without and with the mask: the same initial weights, the same rows in the same order, as many
steps. Each model is scored both ways on rows of held-out documents (bits per byte). Printed as JSON: every score, and
what the mask changes (with minus without), as mean, standard deviation and standard error over the seeds: "as_trained"
scores each model as it was trained, "document_alone" both with the mask, as one reads a single document.
"""

import argparse
import json
import statistics
import sys
import tempfile
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path
from typing import Any

from khanhllm.data.counting import Reading
from khanhllm.inference.score import score
from khanhllm.log.pictures import read_log
from khanhllm.log.run_log import FILE
from khanhllm.runs.evaluate import held_out
from khanhllm.runs.run import open_run
from khanhllm.schema import MachineConfig, TrainConfig
from khanhllm.settings import preset, resolve
from khanhllm.training.run import train

WAYS = {"without": False, "with": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", help="as for khanhllm train")
    parser.add_argument("--preset", default="micro")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=400, help="rows of held-out text to score")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds: at least 2, for a spread")
    runs = [{way: measured(way, seed, options) for way in WAYS} for seed in range(options.seeds)]
    as_trained = [run["with"]["bpb_with"] - run["without"]["bpb_without"] for run in runs]
    alone = [run["with"]["bpb_with"] - run["without"]["bpb_with"] for run in runs]
    told = {"data": options.data, "preset": options.preset, "steps": options.steps, "runs": runs}
    print(json.dumps(told | {"as_trained": spread(as_trained), "document_alone": spread(alone)}, indent=1))


def measured(way: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train one model; its bits per byte read without and with the mask."""
    quiet = {"eval_every": 0, "save_every": 0, "sample_tokens": 0}
    machine = {"device": "cpu", "threads": options.threads}
    given: dict[str, Any] = {
        "data": {"source": options.data},
        "train": {"steps": options.steps, "seed": seed, "document_mask": WAYS[way], **quiet},
        "machine": machine,
    }
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        with redirect_stdout(sys.stderr):
            train(resolve(preset(options.preset), given), run)
        opened = open_run(run, MachineConfig(**machine))
        speed = statistics.median(read_log(run / FILE, ("tokens_per_s",))["tokens_per_s"])
    found = {"tokens_per_s": round(float(speed))}
    for other, mask in WAYS.items():
        reading = Reading.of(TrainConfig(document_mask=mask), opened.tokenizer)
        windows, token_bytes = islice(held_out(opened).windows(), options.windows), opened.tokenizer.token_bytes
        found[f"bpb_{other}"] = score(opened.model, windows, token_bytes, opened.machine, 8, reading)["val_bpb"]
    return found


def spread(differences: list[float]) -> dict[str, float]:
    deviation = statistics.stdev(differences)
    mean = statistics.fmean(differences)
    return {"mean": mean, "deviation": deviation, "error": deviation / len(differences) ** 0.5}


if __name__ == "__main__":
    main()

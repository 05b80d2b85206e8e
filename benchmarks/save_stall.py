"""How long training stands still for a checkpoint, next to how long a step takes.

    python benchmarks/save_stall.py [PRESET] [--saves 7] [--out FILE]

A step is timed alone, then the beginning of a save, then a step while it is being written; in turns, in one run.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from khanhllm.data.batches import random_batches
from khanhllm.machine.devices import open_machine
from khanhllm.settings import preset, resolve
from khanhllm.training import checkpoint
from khanhllm.training.saver import Saver
from khanhllm.training.step import Learner, train_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("preset", nargs="?", default="mini")
    parser.add_argument("--saves", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("save_stall.json"))
    options = parser.parse_args()
    config = resolve(preset(options.preset))
    learner = Learner.new(config, open_machine(config.machine))
    rows = random_batches(config, learner.machine.device)
    state, _ = train_step(learner, learner.start(), rows)
    seconds: dict[str, list[float]] = {"step": [], "stall": [], "step while saving": [], "write": []}

    def step(kind: str) -> None:
        nonlocal state
        started = time.perf_counter()
        state, _ = train_step(learner, state, rows)
        seconds[kind].append(time.perf_counter() - started)

    with tempfile.TemporaryDirectory() as folder, Saver(Path(folder), keep=2) as saver:
        for _ in range(options.saves):
            step("step")
            started = time.perf_counter()
            saver.begin(checkpoint.snapshot(state.step, learner.model, learner.optimizer, {}))
            seconds["stall"].append(time.perf_counter() - started)
            step("step while saving")
            saver.outcome(patient=True)
            seconds["write"].append(saver.seconds)
    found = {
        kind: {"median": statistics.median(all_), "least": min(all_), "most": max(all_)}
        for kind, all_ in seconds.items()
    }
    report = {"preset": options.preset, "machine": learner.machine.describe(), "seconds": found}
    options.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

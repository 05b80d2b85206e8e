"""What several processes cost: two with one thread each, beside one with two, on the same cores and rows.

    python benchmarks/processes.py --preset nano --rounds 5 > benchmarks/results/processes-nano.json
    python benchmarks/processes.py --preset micro --steps 40 --rounds 4 > benchmarks/results/processes-micro.json

They take turns, each a training of its own from the beginning; its speed is the median over its steps but for the
first ten. Printed as JSON: tokens/s of each turn, and the ratio in each round, as median, least and most.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from khanhllm.log.pictures import read_log
from khanhllm.log.run_log import FILE

WARM_UP = 10
"""steps"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--preset", default="micro")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    rates = []
    with tempfile.TemporaryDirectory() as place:
        for _ in range(options.rounds + 1):  # the first prepares the data
            rates.append([tokens_per_s(options, processes, Path(place)) for processes in (1, 2)])
    ratios = [two / one for one, two in rates[1:]]
    spread = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    told = {"preset": options.preset, "data": options.data, "steps": options.steps}
    print(json.dumps(told | {"tokens_per_s": rates[1:], "two_processes_over_one": spread}, indent=1))


def tokens_per_s(options: argparse.Namespace, processes: int, place: Path) -> float:
    run = Path(tempfile.mkdtemp(dir=place)) / "run"
    words = ["train", options.preset, "--data", options.data, "--run", str(run), "--data.cache", str(place / "shards")]
    words += [
        "--machine.device",
        "cpu",
        "--machine.processes",
        str(processes),
        "--machine.threads",
        str(2 // processes),
    ]
    words += ["--train.steps", str(options.steps), "--train.save_every", "0"]
    words += ["--train.eval_every", "0", "--train.sample_tokens", "0"]
    subprocess.run([sys.executable, "-m", "khanhllm", *words], check=True, stdout=sys.stderr)
    return float(statistics.median(read_log(run / FILE, ("tokens_per_s",))["tokens_per_s"][WARM_UP:]))


if __name__ == "__main__":
    main()

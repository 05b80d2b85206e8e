"""What a plan foresees against what happens: six configurations, each in a process of its own.

    python benchmarks/plan_accuracy.py [--without-largest]

Weights, gradients and the optimizer's state must be equal, the peak within 10 %. On a CPU the measuring process gives
freed memory back (a small model's training keeps it, to be faster, and then holds up to 1.6 times as much).
"""

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from khanhllm.lab.measure import measure
from khanhllm.machine.devices import open_machine
from khanhllm.planning import budget
from khanhllm.settings import preset, resolve

RESULTS = Path(__file__).parent / "results"
ONE: dict[str, Any] = {"train": {"micro_batch": 1, "accumulation": 1}}
CASES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "mini": ("mini", []),
    "mini, accumulated, all rebuilt": ("mini", [{"train": {"accumulation": 2}, "machine": {"checkpointing": "full"}}]),
    "mini, classic, selective": ("mini", [{"model": {"style": "classic"}, "machine": {"checkpointing": "selective"}}]),
    "small, 8-bit": ("small", [ONE, {"optim": {"name": "adamw8bit"}}]),
    "small, muon, accumulated": ("small", [ONE, {"optim": {"name": "muon"}, "train": {"accumulation": 2}}]),
    "khanh-692m, one row": ("khanh-692m", [ONE]),
}


def main() -> None:
    hardware = budget.here(open_machine(resolve().machine))
    rows: dict[str, Any] = {}
    for name, (base, settings) in CASES.items():
        if base == "khanh-692m" and "--without-largest" in sys.argv:
            continue
        config = resolve(preset(base), *settings)
        foreseen, real = hardware.takes(config), measure(config)
        exact = (foreseen.weights, foreseen.gradients, foreseen.optimizer) == (
            real["weights"],
            real["gradients"],
            real["optimizer"],
        )
        error = foreseen.peak / real["peak"] - 1
        rows[name] = {"foreseen": foreseen.peak, "measured": real["peak"], "error": error, "exact": exact}
        print(
            f"{name:32} foreseen {foreseen.peak / 1e6:6,.0f} MB  measured {real['peak'] / 1e6:6,.0f} MB  {error:+.1%}  "
            f"weights, gradients, optimizer {'exact' if exact else 'DIFFER'}",
            flush=True,
        )
    facts = {"device": hardware.device, "platform": platform.platform(), "torch": version("torch")}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"plan-accuracy-{hardware.device}.json"
    path.write_text(json.dumps({"machine": facts, "cases": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()

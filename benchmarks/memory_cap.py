"""Does khanh-692m train inside 8 GB, and inside 6 GB? Asked of a CUDA device that is held to so much.

    python benchmarks/memory_cap.py

Three steps of two micro-batches each; what does not fit ends in torch's own error. Results go to benchmarks/results/.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from khanhllm.lab.measure import three_steps
from khanhllm.machine.devices import open_machine, out_of_memory
from khanhllm.settings import preset, resolve

RESULTS = Path(__file__).parent / "results"
LEAN: dict[str, Any] = {"machine": {"weights": "bf16", "gradients": "bf16"}}
CASES: list[tuple[float, dict[str, Any]]] = [(8, {}), (8, LEAN), (6, LEAN)]


def main() -> int:
    if not torch.cuda.is_available():
        print("memory_cap: needs a CUDA device, and there is none here", file=sys.stderr)
        return 2
    found = []
    for cap, settings in CASES:
        config = resolve(preset("khanh-692m"), {"train": {"micro_batch": 1, "accumulation": 2}}, settings)
        machine = open_machine(config.machine)
        whole = torch.cuda.mem_get_info(machine.device)[1]
        torch.cuda.set_per_process_memory_fraction(cap * 1e9 / whole, machine.device)
        torch.cuda.reset_peak_memory_stats(machine.device)
        try:
            found.append({"cap_gb": cap, **settings, **three_steps(config)})
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            found.append({"cap_gb": cap, **settings, "fault": str(error).splitlines()[0]})
        machine.give_back_memory()
        print(found[-1], flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory-cap-cuda.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

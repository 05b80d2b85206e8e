"""What the formulas of `khanhllm plan --gpus` give for trainings that others have published, beside what they measured.

    python benchmarks/plan_published.py

Nothing runs here: each case is the arithmetic that was measured on one card, and the bytes that its way to share a step
moves. Where somebody left open how wide the slots were, both widths are computed. Results go to benchmarks/results/.
"""

import json
from pathlib import Path
from typing import Any

from khanhllm.planning.assumed import link
from khanhllm.planning.many import step_seconds
from khanhllm.planning.ways import Traffic

RESULTS = Path(__file__).parent / "results"


def all_reduce(parameters: float, cards: int) -> Traffic:
    """fp32 gradients summed on all cards by a ring, which moves as much as owners with fp32 weights do."""
    return Traffic(step=round(8 * parameters * (cards - 1) / cards))


def gpt2() -> dict[str, Any]:
    """transformers#9371: GPT-2 (124M), 200 steps with a batch a card, 102 s on one TITAN RTX, 131 s on two."""
    arithmetic = 102 / 200
    times = [
        step_seconds(arithmetic, 0, 1, all_reduce(124.4e6, 2), link(name).speed) for name in ("PCIe 3 x8", "PCIe 3 x16")
    ]
    return {"computed": [arithmetic / time for time in times], "published": 102 / 131, "source": "transformers#9371"}


def bert() -> dict[str, Any]:
    """accelerate#71: BERT base (108M) on MRPC; 21 s for 230 steps on one RTX 2080 Ti, and on two with half the batch on
    each."""
    alone = 21 / 230
    times = [
        step_seconds(alone / 2, 0, 1, all_reduce(108.3e6, 2), link(name).speed) for name in ("PCIe 3 x8", "PCIe 3 x16")
    ]
    return {"computed": [alone / time / 2 for time in times], "published": 21 / 21 / 2, "source": "accelerate#71"}


def qwen3() -> dict[str, Any]:
    """NousResearch/torchtitan#19: Qwen3-30B-A3B on B200, experts over 8 cards: 14,796 tokens/s on each of 8, 13,856 on
    each of 128. FSDP shards what a card has over the 16 machines, 8 rows of 4,096 tokens in a micro-batch (assumed)."""
    arithmetic, machines = 8 * 4096 / 14_796, 16
    moved = round(30.5e9 / 8 * (2 + 2 + 4) * (machines - 1) / machines)
    times = [
        step_seconds(arithmetic, 0, 1, Traffic(0, moved, hidden), link("400 Gb InfiniBand").speed)
        for hidden in (0, 0.5)
    ]
    return {"computed": [arithmetic / time for time in times], "published": 13_856 / 14_796, "source": "torchtitan#19"}


def main() -> None:
    cases = {case.__name__: case() for case in (gpt2, bert, qwen3)}
    path = RESULTS / "plan-published.json"
    path.write_text(json.dumps(cases, indent=1) + "\n", encoding="utf-8")
    for name, case in cases.items():
        low, high = case["computed"]
        print(f"{name:8} efficiency {low:.0%} to {high:.0%}, published {case['published']:.0%} ({case['source']})")


if __name__ == "__main__":
    main()

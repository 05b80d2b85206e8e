"""How much of `generate`'s speed one client sees over HTTP, as it streams: in turns, on an otherwise idle machine.

python benchmarks/serving.py runs/micro [--turns 9] > benchmarks/results/serving-micro.json
"""

import argparse
import http.client
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import khanhllm
from khanhllm.chaos.clients import Served

PROMPT = "It was a dark night, and the"


def stream(port: int, tokens: int) -> int:
    """Read a whole answer as it comes; returns the tokens in it."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    body = {
        "prompt": PROMPT,
        "max_tokens": tokens,
        "seed": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    events = [line for line in connection.getresponse() if line.startswith(b"data: {")]
    connection.close()
    return int(json.loads(events[-1].removeprefix(b"data: "))["usage"]["completion_tokens"])


def seconds(write: Callable[[], object]) -> float:
    started = time.perf_counter()
    write()
    return time.perf_counter() - started


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("run", type=Path)
parser.add_argument("--turns", type=int, default=9)
parser.add_argument("--tokens", type=int, default=128)
options = parser.parse_args()
run = khanhllm.load(options.run)
run.machine.take_process()


with Served(options.run) as served:
    tokens = stream(served.port, options.tokens)
    works = [partial(run.generate, PROMPT, tokens=options.tokens, seed=0), partial(stream, served.port, options.tokens)]
    pairs = [tuple(map(seconds, works)) for _ in range(options.turns + 1)][1:]
ratios = sorted(own / over for own, over in pairs)
print(
    json.dumps(
        {
            "generate_tokens_per_s": tokens / median(own for own, _ in pairs),
            "http_tokens_per_s": tokens / median(over for _, over in pairs),
            "ratio": {"median": median(ratios), "least": ratios[0], "most": ratios[-1]},
            "turns": options.turns,
        },
        indent=1,
    )
)

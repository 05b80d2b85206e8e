"""How much memory does the belt take for a corpus of any size?

    python benchmarks/belt_memory.py [--gigabytes 5] [--out FILE]

Writes a corpus of that size (JSON lines, text of the standard library with a number in each document), lets a belt turn
all of it into rows as fast as it can, and watches the memory of both processes and the disk of the shards.
"""

import argparse
import json
import tempfile
import time
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any

import psutil

from khanhllm.data.belt import Belt
from khanhllm.data.ensure import ensure
from khanhllm.data.readers import Reader
from khanhllm.data.sources import locate
from khanhllm.schema import DataConfig

FILE = 10**8
"""bytes of one source file"""
CONTEXT = 2048


def corpus(folder: Path, size: int) -> int:
    found = locate("stdlib")
    names = iter(found.files)
    texts = [document.text[:5000] for name in islice(names, 300) for document in Reader(found, []).read_file(name)]
    folder.mkdir()
    written = number = 0
    while written < size:
        with (folder / f"{number:05d}.jsonl").open("w", encoding="utf-8", errors="replace") as file:
            while file.tell() < FILE:
                for text in texts:
                    number += 1
                    file.write(json.dumps({"text": f"{number} {text}"}) + "\n")
            written += file.tell()
    return written


def memory(process: psutil.Process) -> int:
    """What is its own (bytes): pages of shards that are mapped from the disk belong to nobody and go when needed."""
    usage = process.memory_info()
    return int(usage.rss - usage.shared)


def watch(belt: Belt, folder: Path) -> dict[str, Any]:
    """Take every row of one lap."""
    me, started = psutil.Process(), time.monotonic()
    most = {"trainer": 0, "maker": 0, "disk": 0}
    first = float("nan")
    rows = looked = 0
    for row in belt.rows_from(0, 0, stopped := Event()):
        if not rows:
            first = time.monotonic() - started
        rows += 1
        if time.monotonic() > looked + 0.2:
            looked = time.monotonic()
            now = {
                "trainer": memory(me),
                "maker": sum(memory(child) for child in me.children()),
                "disk": sum(path.stat().st_size for path in folder.glob("*.bin")),
            }
            most = {key: max(value, now[key]) for key, value in most.items()}
            end = belt.laps(1)
            if end and rows * CONTEXT * end >= 1:
                stopped.set()
        del row
    return {
        "first_row_s": round(first, 2),
        "seconds": round(time.monotonic() - started, 1),
        "rows": rows,
        "tokens_per_s": round(rows * CONTEXT / (time.monotonic() - started)),
        **{f"{key}_mb": round(value / 1e6, 1) for key, value in most.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--out", type=Path, default=Path("belt_memory.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        size = corpus(Path(place, "corpus"), int(options.gigabytes * 1e9))
        data = DataConfig(
            source=str(Path(place, "corpus")), cache=str(Path(place, "cache")), tokenizer_sample=10**7, disk=200_000_000
        )
        folder = ensure(data, 8192, 10**9)
        found = {"corpus_gb": round(size / 1e9, 2)} | watch(Belt(folder, CONTEXT, 2, data.disk, 60), folder)
    options.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

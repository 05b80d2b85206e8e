"""How fast text becomes ids: our encoding (tiktoken) against `tokenizers`, on the same text, cores and vocabulary.

    python benchmarks/tokenizer_speed.py [TEXT_SOURCE] [VOCAB_SIZE]

The two take turns, so that whatever else the machine does falls on both. The ids must be equal.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPEATS = 7
TEXT = 8_000_000


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):7.2f}  ({min(values):.2f} to {max(values):.2f})"


def main(source: str = "stdlib", vocab_size: str = "50000") -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ["RAYON_NUM_THREADS"] = str(cores)
    from tokenizers import Tokenizer as Reference

    from khanhllm.data.documents import Reader
    from khanhllm.data.prepare import train_on
    from khanhllm.data.sources import locate

    ours = train_on(source, int(vocab_size), 100_000_000)
    with tempfile.TemporaryDirectory() as folder:
        ours.save(Path(folder, "tokenizer.json"))
        theirs = Reference.from_file(str(Path(folder, "tokenizer.json")))
    found = locate(source)
    texts: list[str] = []
    size = 0
    for document in (document for name in found.files for document in Reader(found, []).read_file(name)):
        texts.append(document.text)
        size += len(document.text.encode())
        if size > TEXT:
            break
    assert [ids.tolist() for ids in ours.encode_batch(texts, cores)] == [one.ids for one in theirs.encode_batch(texts)]
    roads = [
        lambda: ours.encode_batch(texts, cores),
        lambda: theirs.encode_batch(texts),
        lambda: theirs.encode_batch_fast(texts),
    ]
    mine, plain, fast = zip(*([seconds(road) for road in roads] for _ in range(REPEATS)), strict=True)
    print(
        f"{size / 1e6:.1f} MB of {source}, {len(texts)} documents, {ours.vocab_size} tokens, {cores} cores; ids equal"
    )
    for name, times in {"ours": mine, "tokenizers": plain, "tokenizers, without offsets": fast}.items():
        print(f"{name:28} MB/s {spread([size / 1e6 / one for one in times])}")
    print(f"ours / tokenizers                 {spread([b / a for a, b in zip(mine, plain, strict=True)])}")
    print(f"ours / tokenizers without offsets {spread([b / a for a, b in zip(mine, fast, strict=True)])}")


if __name__ == "__main__":
    main(*sys.argv[1:])

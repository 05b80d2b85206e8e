"""Find, with datatrove, the text that a source holds more than once, so that cleaning can remove it.

spans: three sentences in a row, of which C4 keeps one (Raffel et al. 2020, section 2.2). minhash: near-duplicates
(Broder 1997) as FineWeb finds them, by 14 buckets of 8 hashes over 5-word shingles. It finds two documents that share
80 % of their shingles with probability 0.92, 50 % with 0.05. One document of each cluster stays, on whichever side of
the split it falls.

For each of these steps, one task per group of files reads what the earlier steps leave and writes signatures. One
process then merges them.
"""

import io
import signal
from collections.abc import Iterator
from contextlib import redirect_stderr
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.io import DataFolder
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.sentence_dedup import SentenceDedupSignature, SentenceFindDedups
from fsspec.implementations.local import LocalFileSystem

from khanhllm.data.clean import COMPARING, SPANS, WORDS, Cleaner, Removals, steps_of
from khanhllm.data.readers import Reader
from khanhllm.data.writer import report_path
from khanhllm.errors import UserError
from khanhllm.limits import open_files

MINHASH = MinhashConfig(hash_config=SPANS.hash_config)
FILES = 2**10
"""open at once in a merge, at most: one for each group, of which there are about 256, and some to spare"""
PLACE = np.dtype([("document", "<u4"), ("sentence", "<u2")])
"""where a span begins, in datatrove's files"""


class Signatures(PipelineStep):  # type: ignore[misc]
    """Writes the signatures of the groups of files number rank, rank + world_size, ..."""

    name = "KhanhLLM signatures"
    type = "dedup"

    def __init__(self, step: str, reader: Reader, clean: str, aside: Path, in_child: bool) -> None:
        """step: one of COMPARING, named in `clean`. aside: folder for signatures and a report for each group done."""
        super().__init__()
        self.step = step
        self.reader = reader
        self.clean = clean
        self.aside = aside
        self.in_child = in_child

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        if self.in_child:  # as in the writer
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        reports = reports_of(self.aside, self.step)
        try:
            for group in range(rank, len(self.reader.groups), world_size):
                if not report_path(reports, group).exists():
                    self._sign(self._documents(group), group)
                    report_path(reports, group).touch()
        except OSError as error:
            raise UserError(f"cannot write the signatures: {error.strerror or error}") from None

    def _documents(self, group: int) -> Iterator[Document]:
        steps = steps_of(self.clean)
        before = ", ".join(steps[: steps.index(self.step)])
        texts = (document.text for document in self.reader.run(rank=group))
        for text, _ in Cleaner(before, removals=removals(self.aside, self.clean, group)).run(texts):
            yield Document(text=text, id="")

    def _sign(self, documents: Iterator[Document], group: int) -> None:
        folder = str(self.aside / self.step / "signatures")
        if self.step == "minhash":
            MinhashDedupSignature(folder, MINHASH, language=WORDS).run(documents, group)
            return
        signer = SentenceDedupSignature(folder, config=SPANS, language=WORDS)
        kind = np.dtype([("hash", SPANS.hash_config.np_descr), ("doc", "<u4"), ("sent", "<u2")])
        # as arrays, 14 bytes each: datatrove keeps a list of tuples and fails at sentence 65,536 of a document
        parts = [np.array(signer.get_hashes(text, number)[: 2**16], kind) for number, text in enumerate(documents)]
        signer.save_hashes(group, np.concatenate(parts or [np.empty(0, kind)]))


class _Folder(DataFolder):  # type: ignore[misc]
    """datatrove's folder, whose own name is no pattern: with a `[` in it, datatrove finds nothing there."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), fs=LocalFileSystem())

    def glob(self, path: str, **_: Any) -> dict[str, Any]:
        return {name: info for name, info in self.find("", detail=True).items() if fnmatch(name, path)}


def reports_of(aside: Path, step: str) -> Path:
    """The folder of a step's reports."""
    return aside / step / "reports"


def merge(aside: Path, step: str) -> None:
    """Compare the signatures of all groups and write what the step removes."""
    folder = aside / step
    signatures, pairs, new = folder / "signatures", folder / "pairs", folder / "remove.part"
    if (folder / "remove").exists():
        return
    new.mkdir(exist_ok=True)
    open_files(FILES)
    with redirect_stderr(io.StringIO()):  # progress bars
        if step == "spans":
            SentenceFindDedups(_Folder(signatures), str(new), config=SPANS).run()
        else:
            for bucket in range(MINHASH.num_buckets):
                MinhashDedupBuckets(str(signatures), str(pairs), config=MINHASH).run(None, bucket, MINHASH.num_buckets)
            MinhashDedupCluster(_Folder(pairs), str(new), MINHASH).run()
    new.rename(folder / "remove")


def removals(aside: Path, clean: str, group: int) -> Removals:
    """What the comparing steps of `clean` remove from a group, for the steps that are merged already."""
    return {step: _removed(aside / step / "remove", group) for step in COMPARING if step in steps_of(clean)}


def _removed(folder: Path, group: int) -> dict[int, list[int]]:
    documents, spans = folder / f"{group:06d}.remove", folder / f"0000/{group:05d}.c4_dup"
    removed: dict[int, list[int]] = {}
    if documents.exists():
        removed = {document: [] for document in np.fromfile(documents, "<u4").tolist()}
    if spans.exists():
        for document, sentence in np.sort(np.fromfile(spans, PLACE)).tolist():
            removed.setdefault(document, []).append(sentence)
    return removed

"""Near-duplicates of a whole source, by MinHash (Broder 1997) as FineWeb does it: datatrove's, with its configuration.

14 buckets of 8 hashes over 5-word shingles: two documents that share 80 % of their shingles are found with probability
0.92, 50 % with 0.05. The first pass, one task for each group of files, writes signatures; they are then merged in one
process, and of each cluster of near-duplicates one document stays, on whichever side of the split it falls.
"""

import io
import signal
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupSignature,
)
from datatrove.utils.hashing import HashConfig

from khanhllm.config import UserError
from khanhllm.data.clean import WORDS, Cleaner
from khanhllm.data.documents import Reader
from khanhllm.data.writer import report_path

CONFIG = MinhashConfig(hash_config=HashConfig(hash_fc="sha1"))  # the other hash needs one more dependency


class Signatures(PipelineStep):  # type: ignore[misc]
    """Writes the signatures of the groups of files number rank, rank + world_size, ..."""

    name = "KhanhLLM signatures"
    type = "dedup"

    def __init__(self, reader: Reader, clean: str, folder: Path, reports: Path, in_child: bool) -> None:
        """clean: the steps before. reports: gets a file for each group that is done."""
        super().__init__()
        self.reader = reader
        self.clean = clean
        self.folder = folder
        self.reports = reports
        self.in_child = in_child

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        if self.in_child:  # as in the writer
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        step = MinhashDedupSignature(str(self.folder / "signatures"), CONFIG, language=WORDS)
        try:
            for group in range(rank, len(self.reader.groups), world_size):
                if not report_path(self.reports, group).exists():
                    texts = (document.text for document in self.reader.run(rank=group))
                    step.run((Document(text=text, id="") for text, _ in Cleaner(self.clean).run(texts)), group)
                    report_path(self.reports, group).touch()
        except OSError as error:
            raise UserError(f"cannot write the signatures: {error.strerror or error}") from None


def merge(folder: Path) -> None:
    """Find the clusters in the signatures of all groups, and write down which documents go."""
    found = folder / "remove"
    if found.exists():
        return
    new = folder / "remove.part"
    pairs = MinhashDedupBuckets(str(folder / "signatures"), str(folder / "pairs"), config=CONFIG)
    for bucket in range(CONFIG.num_buckets):
        pairs.run(None, bucket, CONFIG.num_buckets)
    new.mkdir(exist_ok=True)
    with redirect_stderr(io.StringIO()):  # a progress bar
        MinhashDedupCluster(str(folder / "pairs"), str(new), CONFIG).run()
    new.rename(found)


def copies(folder: Path, group: int) -> frozenset[int]:
    """Numbers of the documents of a group that go, among those that the steps before leave."""
    path = folder / "remove" / f"{group:06d}.remove"
    return frozenset(np.fromfile(path, "<u4").tolist()) if path.exists() else frozenset()

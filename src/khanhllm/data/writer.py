"""The writing step of the datatrove pipeline: one shard for each split and group of files.

It writes a report of each group, because a task may run in another process or on another machine and cannot return
one. The report appears last and whole, so a group that has one is finished, and no task repeats it. A hash of its text
alone decides in which split a document goes.
"""

import hashlib
import signal
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from datatrove.pipeline.base import PipelineStep
from pydantic import BaseModel

from khanhllm.data.chat import from_json
from khanhllm.data.clean import Cleaner, Removals
from khanhllm.data.readers import Reader
from khanhllm.data.render import AT_ONCE, blocks, cut
from khanhllm.data.shards import Dtype, Laid, Shard, Split, Tally, dtype_for
from khanhllm.data.tokenizer import Tokenizer
from khanhllm.errors import UserError
from khanhllm.files import publish

BATCH = 2**20
"""characters tokenized at once"""
Item = TypeVar("Item")
HASHES = 2**64
"""number of different text hashes"""


class Report(BaseModel):
    """What the writer made of one group of files."""

    shards: list[Shard]
    lowest: int
    highest: int
    """hashes of the group's texts"""
    tally: Tally = ()
    """what cleaning read and removed"""
    skipped: dict[str, int] = {}
    """files that could not be read, by ending, and conversations (data.bad = skip)"""
    laid: Laid | None = None
    """how its conversations were packed"""

    def count(self, split: Split) -> int:
        """Tokens of one split."""
        return sum(shard.tokens for shard in self.shards if shard.split == split)


class ShardWriter(PipelineStep):  # type: ignore[misc]
    """Reads, tokenizes, splits and writes the groups of files number rank, rank + world_size, ..."""

    name = "KhanhLLM shards"
    type = "writer"

    def __init__(
        self,
        reader: Reader,
        shards: Path,
        reports: Path,
        threshold: int,
        most: int,
        threads: int,
        in_child: bool,
        clean: str = "",
        removals: Callable[[int], Removals] | None = None,
    ) -> None:
        """threshold: hashes below it are held out. most: training tokens after which a group ends, 0 for none.

        removals: what the steps of `clean` that compare all documents remove from a group.
        """
        super().__init__()
        self.reader = reader
        self.shards = shards
        self.reports = reports
        self.threshold = threshold
        self.most = most
        self.threads = threads
        self.in_child = in_child
        self.clean = clean
        self.removals = removals

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        if self.in_child:  # Ctrl-C reaches all processes of the group; the parent handles it for all
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        tokenizer = Tokenizer.load(self.shards / "tokenizer.json")
        try:
            for group in range(rank, len(self.reader.groups), world_size):
                if not report_path(self.reports, group).exists():
                    self._group(group, tokenizer)
        except OSError as error:
            raise UserError(f"cannot write the shards: {error.strerror or error}") from None

    def _group(self, group: int, tokenizer: Tokenizer) -> None:
        dtype = dtype_for(tokenizer.vocab_size)
        cleaner = Cleaner(self.clean, removals=self.removals(group) if self.removals else {})
        with (
            Growing(self.shards / f"train-{group:05d}.bin.part", "train", dtype) as train,
            Growing(self.shards / f"validation-{group:05d}.bin.part", "validation", dtype) as held,
        ):
            self.reader.skipped.clear()
            texts = (document.text for document in self.reader.run(rank=group))
            if self.reader.source.laid_for:
                found = self._lay(texts, tokenizer, train, held)
            else:
                found = self._write(texts, cleaner, tokenizer, train, held)
        shards = []
        for growing in (train, held):
            if growing.tokens:
                shards.append(growing.shard(growing.path.stem))
                growing.path.replace(growing.path.with_suffix(""))
        report = Report(shards=shards, skipped=self.reader.skipped, **found)
        publish(report_path(self.reports, group), report.model_dump_json())

    def _write(
        self, texts: Iterable[str], cleaner: Cleaner, tokenizer: Tokenizer, train: "Growing", held: "Growing"
    ) -> dict[str, Any]:
        lowest, highest, tally = HASHES, 0, cleaner.tally
        for batch in batched(cleaner.run(texts), lambda item: len(item[0])):
            encoded = tokenizer.encode_batch([text for text, _ in batch], self.threads)
            for (text, tally), ids in zip(batch, encoded, strict=True):
                raw = text.encode()
                value = text_hash(raw)
                lowest, highest = min(lowest, value), max(highest, value)
                (held if value < self.threshold else train).add(tokenizer.end_of_text, ids, len(raw))
                # at least two different texts, else there would be nothing to hold out
                if 0 < self.most <= train.tokens and lowest < highest:
                    return {"lowest": lowest, "highest": highest, "tally": tally}
        return {"lowest": lowest, "highest": highest, "tally": cleaner.tally}

    def _lay(self, texts: Iterable[str], tokenizer: Tokenizer, train: "Growing", held: "Growing") -> dict[str, Any]:
        """Pack conversations into rows. The hash of a whole one decides its split."""
        context, lowest, highest = self.reader.source.laid_for, HASHES, 0
        laid = Laid(context=context)
        waiting: dict[Growing, list[tuple[np.ndarray, int]]] = {train: [], held: []}
        for text in texts:
            messages = from_json(text)
            ids, lost = cut(messages, tokenizer, context)
            laid += Laid(context=0, conversations=bool(len(ids)), cut=lost and bool(len(ids)), left_out=not len(ids))
            if not len(ids):
                continue
            value = text_hash(text.encode())
            lowest, highest = min(lowest, value), max(highest, value)
            growing = held if value < self.threshold else train
            waiting[growing].append((ids, int(tokenizer.token_bytes[ids].sum())))
            if len(waiting[growing]) == AT_ONCE:
                growing.pack(waiting[growing], context, tokenizer.end_of_text)
                waiting[growing] = []
                if 0 < self.most <= train.tokens and lowest < highest:
                    break
        for growing, left in waiting.items():
            growing.pack(left, context, tokenizer.end_of_text)
            if growing.tokens:
                growing.write(np.array([tokenizer.end_of_text]), 0, 0)  # the last target of the last row
        return {"lowest": lowest, "highest": highest, "laid": laid}


class Growing:
    """A shard that is being written."""

    def __init__(self, path: Path, split: Split, dtype: Dtype) -> None:
        self.path = path
        self.split = split
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.hash = hashlib.sha256()
        self.tokens = self.bytes = self.documents = 0

    def __enter__(self) -> "Growing":
        self.file = self.path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        if not self.tokens:
            self.path.unlink()

    def add(self, end_of_text: int, ids: np.ndarray, size: int) -> None:
        """Append end-of-text and a document of `size` bytes."""
        self.write(np.concatenate([[end_of_text], ids]), size, 1)

    def pack(self, conversations: list[tuple[np.ndarray, int]], context: int, end_of_text: int) -> None:
        """Append conversations, given with their sizes (bytes of text), in rows of `context` tokens."""
        for block in blocks((ids for ids, _ in conversations), context, end_of_text):
            self.write(block, 0, 0)
        self.bytes += sum(size for _, size in conversations)
        self.documents += len(conversations)

    def write(self, ids: np.ndarray, size: int, documents: int) -> None:
        """Append ids, which stand for so many documents of `size` bytes of text."""
        block = ids.astype(self.dtype).tobytes()
        self.file.write(block)
        self.hash.update(block)
        self.tokens += len(ids)
        self.bytes += size
        self.documents += documents

    def shard(self, name: str = "") -> Shard:
        """The manifest's entry for the shard, as it is now."""
        return Shard(
            file=name or self.path.name,
            split=self.split,
            tokens=self.tokens,
            bytes=self.bytes,
            documents=self.documents,
            sha256=self.hash.hexdigest(),
        )


def batched(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Group neighbours into lists of about BATCH in total size."""
    batch: list[Item] = []
    total = 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= BATCH:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def share_note(held: int, total: int, asked: float, documents: int) -> str:
    """What to say if the share of the text (bytes) that is held out differs much from the share asked for; else ""."""
    share = held / max(1, total)
    if asked / 2 <= share <= 2 * asked:
        return ""
    return (
        f"held out for validation: {share:.1%} of the text, where data.validation asks for {asked:.1%}; "
        f"whole documents are held out, and there are only {documents:,} of them: shorter ones, or more, come closer"
    )


def no_text(name: str, clean: str, skipped: bool) -> UserError:
    """What to raise if a source gives no text. skipped: whether any of it could not be read."""
    why = f"cleaning it by {clean} leaves nothing" if clean else "every file of it is empty"
    why = "nothing of it can be read (data.bad = skip)" if skipped else why
    return UserError(f"{name} holds no text: {why}")


def single_text(name: str, documents: int) -> UserError:
    """What to raise if there is only one text, so that nothing can be held out without being trained on."""
    what = f"all {documents:,} documents of {name} are the same text" if documents > 1 else f"{name} is one document"
    return UserError(f"{what}, but another one must be held out for validation; give more text")


def text_hash(raw: bytes) -> int:
    """The hash of a text, below HASHES, that decides its split."""
    return int.from_bytes(blake2b(raw, digest_size=8).digest(), "little")


def report_path(folder: Path, group: int) -> Path:
    """The file of a group's report."""
    return folder / f"group-{group:05d}.json"

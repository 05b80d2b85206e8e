"""The shard format: a folder of raw little-endian token ids, a manifest that says what they are, and a tokenizer.

    manifest.json   tokenizer.json   vocab.txt   train-00000.bin   validation-00000.bin   ...

Each document is preceded by end-of-text: E doc E doc E doc. So a shard always starts with E, every byte of the text is
the target of some prediction, and a prompt after a lone E is exactly what training has seen.

Reading is a memory map: nothing is loaded before it is used, and all processes share the pages. The order of rows is
computed, not stored: `shuffled` permutes any single index in constant memory. So one integer is the whole position of a
run.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Generator, Iterator
from functools import cached_property, lru_cache
from itertools import accumulate, count
from pathlib import Path
from threading import Event
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from khanhllm.errors import UserError
from khanhllm.files import read, sha256_of

VERSION = 1
MANIFEST = "manifest.json"
CHECKED = 2**31
"""size (bytes) up to which every byte of a split is checked when it is opened, which takes a second or two; for larger
ones there is `khanhllm data verify`"""

ROUNDS = 8
"""rounds of the Feistel network that shuffles"""
WORD_BITS = 64
WORD = 2**WORD_BITS - 1

Split = Literal["train", "validation"]
Dtype = Literal["uint16", "uint32"]
Tally = tuple[tuple[int, int], ...]
"""of a cleaning, documents and bytes: those read, then those that each step removed"""


class Shard(BaseModel):
    """One file of token ids, as the manifest describes it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: Annotated[str, Field(pattern=r"^[\w-]+\.bin$")]
    split: Split
    tokens: Annotated[int, Field(gt=0)]
    bytes: Annotated[int, Field(gt=0)]
    """raw UTF-8 text behind the tokens (bytes)"""
    documents: Annotated[int, Field(gt=0)]
    sha256: str


class Removed(BaseModel):
    """What one step of cleaning removed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: str
    documents: int
    bytes: int
    """of text, also of documents that were only shortened"""


class Cleaning(BaseModel):
    """What cleaning did to the documents that were read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    documents: int
    bytes: int
    """read, before any step"""
    removed: tuple[Removed, ...]
    """by each step, in order"""

    @property
    def steps(self) -> str:
        return ", ".join(lost.step for lost in self.removed)

    @property
    def kept(self) -> tuple[int, int]:
        """Documents and bytes."""
        documents = self.documents - sum(lost.documents for lost in self.removed)
        return documents, self.bytes - sum(lost.bytes for lost in self.removed)


class Laid(BaseModel):
    """How conversations were packed into rows (render.py)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    context: int
    """tokens of a row; each begins with a conversation and is padded with end-of-text"""
    conversations: int = 0
    cut: int = 0
    """of them, those that lost their last turns, because they are longer than a row"""
    left_out: int = 0
    """conversations without an answer, or whose first one does not fit into a row"""

    def __add__(self, other: "Laid") -> "Laid":
        ours, theirs = self.model_dump(), other.model_dump()
        return Laid(**{key: ours[key] + theirs[key] for key in ours} | {"context": self.context})

    def describe(self) -> str:
        """In words."""
        lost = [f"{self.cut:,} cut at a turn"] * bool(self.cut)
        lost += [f"{self.left_out:,} left out, as no answer of theirs fits"] * bool(self.left_out)
        return ", ".join([f"{self.conversations:,} conversations in rows of {self.context:,} tokens", *lost])


class Manifest(BaseModel):
    """What a folder of shards holds and how it was made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    source: str
    tokenizer: str
    """sha256 of tokenizer.json"""
    vocab_size: Annotated[int, Field(gt=0)]
    dtype: Dtype
    validation: float
    """share of the documents to hold out, as the user asked"""
    train_tokens: int
    validation_tokens: int
    shards: tuple[Shard, ...]
    cleaning: Cleaning | None = None
    """None: nothing was cleaned"""
    skipped: dict[str, int] | None = None
    """files that could not be read to their end, by ending, and conversations (data.bad = skip); None: no such"""
    laid: Laid | None = None
    """None: documents, one after the other"""

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of a folder of shards. Raises UserError if there is none or it is not one of ours."""
        path = folder / MANIFEST
        try:
            manifest = cls.model_validate_json(read(path))
        except OSError as error:
            raise UserError(f"{folder} is not a folder of prepared shards: {path.name}: {error.strerror}") from None
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise UserError(
                f"{path} is damaged or not a shard manifest ({key}: {first['msg']}); prepare again, "
                f"or if {folder} holds texts, name them by a pattern: '{folder}/**'"
            ) from None
        if manifest.version != VERSION:
            raise UserError(f"{path} has version {manifest.version}, this program reads {VERSION}; prepare again")
        return manifest

    @property
    def cleaned_by(self) -> str:
        return self.cleaning.steps if self.cleaning else ""

    def of(self, split: str) -> list[Shard]:
        """The shards of one split, in order."""
        return [shard for shard in self.shards if shard.split == split]


def dtype_for(vocab_size: int) -> Dtype:
    """The type of stored ids: two bytes a token where the vocabulary allows."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


class Shards:
    """The tokens of one split, as rows to train on or windows to score. Made by `Shards.open`."""

    def __init__(self, folder: Path, split: str, context: int, manifest: Manifest) -> None:
        self.folder = folder
        self.context = context
        self.manifest = manifest
        self.vocab_size = manifest.vocab_size
        self._shards = manifest.of(split)
        self._ids = [mapped(folder, shard, manifest.dtype) for shard in self._shards]
        self._ends = list(accumulate((len(ids) - 1) // context for ids in self._ids))
        self.rows = self._ends[-1] if self._ends else 0
        self.tokens = sum(shard.tokens for shard in self._shards)
        # a validation split may be short: windows() uses the tails that rows drop
        if not self.tokens or (split == "train" and not self.rows):
            need = f"one row needs {context + 1} of them in one shard; take more text or a smaller model.context"
            raise UserError(f"{folder} has {self.tokens} {split} tokens, too few for a context of {context}: {need}")

    @classmethod
    def open(cls, folder: Path, split: str, context: int) -> "Shards":
        """Open one split, "train" or "validation", for rows of context + 1 tokens.

        Raises UserError that names the file if one is missing, cut short or of another type than the manifest says, if
        a split of up to CHECKED bytes is damaged anywhere, and if the training split has no row.
        """
        shards = cls(folder, split, context, Manifest.read(folder))
        if sum(ids.nbytes for ids in shards._ids) <= CHECKED:
            shards.verify()
        return shards

    @cached_property
    def sha256(self) -> str:
        """Identity of the split: equal for equal tokens in equal shards, wherever the folder lies."""
        return hashlib.sha256("".join(shard.sha256 for shard in self._shards).encode()).hexdigest()

    def row(self, index: int) -> np.ndarray:
        """Row number `index` of `rows`: int64 (context + 1,); neighbours share one token.

        Raises UserError if it holds an id beyond the vocabulary.
        """
        if not 0 <= index < self.rows:
            raise IndexError(f"row {index} of {self.rows}")
        nth = bisect_right(self._ends, index)
        start = (index - (self._ends[nth - 1] if nth else 0)) * self.context
        return self._window(nth, start)

    def rows_from(self, cursor: int, seed: int, stopped: Event) -> Generator[np.ndarray]:
        """Yield rows from number `cursor` of the run on, endlessly: epoch after epoch, each in an order of its own."""
        for number in count(cursor):
            epoch, index = divmod(number, self.rows)
            yield self.row(shuffled(index, self.rows, seed, epoch))

    def describe(self) -> str:
        """The size and place of the split, in words."""
        return f"{self.tokens:,} training tokens in {self.folder}"

    def laps(self, tokens: int) -> float:
        """How often a run of so many tokens reads all rows."""
        return tokens / (self.rows * self.context)

    def windows(self) -> Iterator[np.ndarray]:
        """Yield all tokens in order: int64 arrays of 2 to context + 1 ids, each starting with the last id before it.

        Every token but the first end-of-text of each shard is a target exactly once.
        """
        for nth, ids in enumerate(self._ids):
            for start in range(0, len(ids) - 1, self.context):
                yield self._window(nth, start)

    def _window(self, nth: int, start: int) -> np.ndarray:
        ids = self._ids[nth][start : start + self.context + 1]
        if ids.max() >= self.vocab_size:
            at = int(np.argmax(ids >= self.vocab_size))
            what = f"token id {ids[at]} at position {start + at} is beyond the vocabulary of {self.vocab_size}"
            raise UserError(f"{self.folder / self._shards[nth].file}: {what}; the file is damaged, prepare again")
        return ids.astype(np.int64)

    def verify(self) -> None:
        """Read every file of the split and compare its sha256 with the manifest. Raises UserError naming the first."""
        for shard in self._shards:
            if fault := damage(self.folder, shard):
                raise UserError(fault)


def too_short(shard_tokens: int, context: int) -> str:
    """What to say when shards made while training have no room for a row."""
    row = f"one row of {context + 1} tokens (model.context + 1)"
    return f"shards of data.shard_tokens = {shard_tokens} are shorter than {row}; raise data.shard_tokens"


def damage(folder: Path, shard: Shard) -> str:
    """One line about a shard whose file is missing or whose sha256 is not the manifest's; empty if it is intact."""
    path = folder / shard.file
    try:
        actual = sha256_of(path)
    except OSError as error:
        return f"cannot read {path}: {error.strerror}; prepare again"
    return "" if actual == shard.sha256 else f"{path} is damaged: its sha256 is not the manifest's; prepare again"


def mapped(folder: Path, shard: Shard, dtype: Dtype) -> np.ndarray:
    """The ids of a shard, as a memory map. Raises UserError if the file is missing or of another length."""
    path = folder / shard.file
    kind = np.dtype(dtype).newbyteorder("<")
    try:
        size = path.stat().st_size
        if size != shard.tokens * kind.itemsize:
            expected = f"{shard.tokens} tokens of {dtype} are {shard.tokens * kind.itemsize} bytes"
            raise UserError(f"{path} has {size} bytes, but {expected}; it is cut short or changed, prepare again")
        return np.memmap(path, dtype=kind, mode="r").view(np.ndarray)  # slices of a memmap cost five times as much
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; prepare again") from None


def shuffled(index: int, rows: int, seed: int, epoch: int) -> int:
    """The place of `index` in this epoch's random order of range(rows): a bijection for every (seed, epoch).

    A Feistel network permutes the next power of four. Applying it again until the result is below `rows` (at most four
    times, on average) leaves a permutation of exactly range(rows).
    """
    if not 0 <= index < rows:
        raise IndexError(f"row {index} of {rows}")
    half = max(1, ((rows - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = _round_keys(seed, epoch)
    while True:
        left, right = index >> half, index & mask
        for factor, summand in keys:
            left, right = right, left ^ (right * factor + summand & WORD) >> WORD_BITS - half
        index = left << half | right
        if index < rows:
            return index


@lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> list[tuple[int, int]]:
    """An odd factor and a summand for each round of the network. The high bits of value * factor + summand are the hash
    of a value (multiply-shift, Dietzfelbinger 1996), which costs a hundredth of a cryptographic one."""
    drawn = hashlib.shake_128(seed.to_bytes(8, "little") + epoch.to_bytes(8, "little")).digest(16 * ROUNDS)
    words = [int.from_bytes(drawn[at : at + 8], "little") for at in range(0, len(drawn), 8)]
    return [(factor | 1, summand) for factor, summand in zip(words[::2], words[1::2], strict=True)]

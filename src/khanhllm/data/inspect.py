"""Inspect text before training: what is in it, how it is tokenized, what cannot be read.

A source of text and a folder of prepared shards are both read document by document: all are measured, the first few
are printed in part, and memory holds one of them. `verify` reads every file of a folder of shards and compares it with
the manifest.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from khanhllm.data.belt_notes import Made, Position
from khanhllm.data.chat import from_json
from khanhllm.data.clean import cleaning_of, table
from khanhllm.data.counting import Marks
from khanhllm.data.counting import counted as counted_in
from khanhllm.data.readers import Reader, holds_conversations
from khanhllm.data.render import render
from khanhllm.data.shards import MANIFEST, Cleaning, Manifest, Shard, damage, mapped
from khanhllm.data.source_syntax import with_home, without_query
from khanhllm.data.sources import Source, in_words, locate
from khanhllm.data.tokenizer import Tokenizer
from khanhllm.data.walk import KINDS
from khanhllm.draw import histogram, horizontal_bars, visible
from khanhllm.errors import UserError
from khanhllm.units import counted

BEGINNING = 600
"""characters of a document that are printed"""
MEASURED = 2**18
"""characters of a document that are tokenized; the tokens behind them are estimated"""
BLOCK = 2**20
"""ids of a shard read at once"""
TOP = 10  # parts of a source that get a line of their own
STYLES = ("black on #b8d8f0", "black on #f5dfa8")


@dataclass(frozen=True)
class SampleDoc:
    """One document of a sample."""

    name: str
    size: int
    """of its text (bytes)"""
    pieces: list[str]
    """its beginning, token by token if the tokenizer is known"""
    tokens: int = 0
    """0 if the tokenizer is not known"""
    exact: bool = True
    whole: bool = True
    """whether the beginning is all of it"""
    counts: list[bool] | None = None
    """of a conversation, whether each piece counts in tuning"""


@dataclass
class Sample:
    """The sizes of the documents read so far, and what could not be read."""

    sizes: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def record(self, parts: Iterable[Iterable[SampleDoc]]) -> Iterator[SampleDoc]:
        """Yield the documents of all parts. If a part cannot be read, note the fault and continue with the next."""
        for part in parts:
            try:
                for document in part:
                    self.sizes.append(document.size)
                    self.tokens.append(document.tokens)
                    yield document
            except UserError as error:
                self.faults.append(str(error))


def show(source: str, tokenizer_file: str | None, documents: int, sample: int) -> None:
    """Print what is in a source of text or a folder of shards. Raises UserError if nothing of it can be read."""
    if documents < 0 or sample < 1:
        raise UserError(f"--documents must be at least 0 and --sample at least 1, got {documents} and {sample}")
    documents, sample = min(documents, sys.maxsize), min(sample, sys.maxsize)  # no counter goes further
    console = Console(highlight=False, markup=False, soft_wrap=True)
    folder = with_home(source)
    if not (folder / MANIFEST).is_file():
        with TemporaryDirectory(prefix="khanhllm-") as spool:
            _show_text(console, locate(source), tokenizer_file, documents, sample, Path(spool))
    elif tokenizer_file:
        raise UserError(f"{folder} holds prepared shards, which have their own tokenizer; leave out --tokenizer")
    else:
        _show_shards(console, folder, documents, sample)


def _show_text(
    console: Console, source: Source, tokenizer_file: str | None, documents: int, sample: int, spool: Path
) -> None:
    tokenizer = Tokenizer.load(Path(tokenizer_file)) if tokenizer_file else None
    size = f"about {source.size:,} bytes of text" if source.size else "size unknown"
    console.print(visible(f"{source.name}: {counted(len(source.files), 'file')}, {size}"))
    if left_out := source.left_out_line():
        console.print(visible(left_out))
    if talks := holds_conversations(source, spool):
        source = replace(source, laid_for=1)
        console.print("conversations; what counts in `khanhllm tune` is coloured, or «marked»")
    sample_doc = _sample_talk if talks else _sample_doc
    reader = Reader(source, [], spool)
    parts = ((sample_doc(text.text, text.id, tokenizer) for text in reader.read_file(name)) for name in source.files)
    seen = _print_sample(console, parts, documents, sample)
    _shares(console, source)
    rejected = [counted(reader.blank, "blank document"), counted(len(seen.faults), "unreadable file")]
    _print_rejected(console, source.name, seen, rejected)
    if not tokenizer:
        console.print("\nto see where tokens begin and end, add --tokenizer FILE (made by `khanhllm tokenizer`)")


def _show_shards(console: Console, folder: Path, documents: int, sample: int) -> None:
    manifest = _manifest(folder)
    tokenizer = _own_tokenizer(folder, manifest)
    size = np.dtype(manifest.dtype).itemsize * sum(shard.tokens for shard in manifest.shards)
    shards = counted(len(manifest.shards), "shard")
    console.print(visible(f"{folder}: {shards}, {size:,} bytes, made from {manifest.source}"))
    console.print(_splits(manifest))
    if manifest.laid:
        console.print(manifest.laid.describe())
    if skipped := _skipped_so_far(folder) or manifest.skipped:
        console.print(f"skipped, from where they could not be read: {in_words(skipped.items())}")
    if manifest.cleaning:
        console.print(table(_cleaning_so_far(folder, manifest) or manifest.cleaning))
    parts = (_documents(folder, shard, manifest, tokenizer) for shard in manifest.of("train"))
    seen = _print_sample(console, parts, documents, sample)
    _print_rejected(console, str(folder), seen, [counted(len(seen.faults), "unreadable shard")])


def _print_sample(console: Console, parts: Iterable[Iterable[SampleDoc]], documents: int, most: int) -> Sample:
    """Print the first few documents and the sizes of all that were read, at most `most` or `documents`."""
    sample = Sample()
    for number, document in enumerate(islice(sample.record(parts), max(most, documents))):
        if number < documents:
            _print(console, number + 1, document)
    console.print(f"\nmeasured: {counted(len(sample.sizes), 'document')}")
    if any(sample.tokens):
        console.print(histogram("tokens of a document", sample.tokens), end="")
        ratios = [size / tokens for size, tokens in zip(sample.sizes, sample.tokens, strict=True) if tokens]
        console.print(histogram("bytes of a token, for each document", ratios, step=0.5, most=8.0), end="")
    elif sample.sizes:
        console.print(histogram("bytes of a document", sample.sizes), end="")
    return sample


def _print_rejected(console: Console, name: str, sample: Sample, rejected: list[str]) -> None:
    console.print(f"\nrejected: {', '.join(rejected)}")
    for fault in sample.faults:
        console.print(visible(f"  ✗ {' '.join(fault.split())}"))
    if not sample.sizes:
        raise UserError(": ".join([f"{name} has no document that can be read", *sample.faults[:1]]))


def _sample_doc(text: str, name: str, tokenizer: Tokenizer | None) -> SampleDoc:
    size = len(text.encode())
    if not tokenizer:
        return SampleDoc(name, size, [text[:BEGINNING]], whole=len(text) <= BEGINNING)
    measured = text[:MEASURED]
    ids = tokenizer.encode_batch([measured])[0]
    pieces = _pieces(ids, tokenizer)
    tokens = len(ids) if len(measured) == len(text) else round(len(ids) * size / len(measured.encode()))
    return SampleDoc(name, size, pieces, tokens, len(measured) == len(text), len(pieces) == tokens)


def _sample_talk(text: str, name: str, tokenizer: Tokenizer | None) -> SampleDoc:
    messages = from_json(text)
    size = sum(len(message.text.encode(errors="replace")) for message in messages)
    if tokenizer:
        ids = np.array(render(messages, tokenizer))
        pieces = _pieces(ids, tokenizer)
        counts = [False, *counted_in(ids[None], Marks.of(tokenizer))[0].tolist()]
        return SampleDoc(name, size, pieces, len(ids), whole=len(pieces) == len(ids), counts=counts)
    marked = [(f"<|{role}|>", False) for role, _ in messages]
    said = [(said + "<|end|>" * (role == "assistant"), role == "assistant") for role, said in messages]
    parts = [part for pair in zip(marked, said, strict=True) for part in pair]
    return SampleDoc(name, size, [piece for piece, _ in parts], counts=[counts for _, counts in parts])


def _pieces(ids: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """The first tokens, each as text; a byte that is only part of a character appears as an escape."""
    pieces = [tokenizer.decode_bytes([rank]).decode("utf-8", "backslashreplace") for rank in ids[:BEGINNING]]
    lengths = accumulate(map(len, pieces), initial=0)
    return [piece for piece, before in zip(pieces, lengths, strict=False) if before < BEGINNING]


def _documents(folder: Path, shard: Shard, manifest: Manifest, tokenizer: Tokenizer) -> Iterator[SampleDoc]:
    """The documents of a shard; memory holds one block of it."""
    ids = mapped(folder, shard, manifest.dtype)
    for number, (start, end) in enumerate(_spans(ids, tokenizer.end_of_text)):
        blocks = (ids[at : min(at + BLOCK, end)] for at in range(start, end, BLOCK))
        try:
            size = sum(int(tokenizer.token_bytes[block].sum()) for block in blocks)
        except IndexError:
            raise UserError(f"{folder / shard.file} holds a token beyond the vocabulary; prepare again") from None
        pieces = _pieces(ids[start:end], tokenizer)
        counts = None
        if manifest.laid:
            row = np.array([[tokenizer.end_of_text, *ids[start:end]]])
            counts = counted_in(row, Marks.of(tokenizer))[0].tolist()
        whole = len(pieces) == end - start
        yield SampleDoc(f"{shard.file}/{number}", size, pieces, end - start, whole=whole, counts=counts)


def _spans(ids: np.ndarray, end_of_text: int) -> Iterator[tuple[int, int]]:
    """Where documents start and end; each follows an end-of-text."""
    start = 0
    for at in range(0, len(ids), BLOCK):
        for mark in np.flatnonzero(ids[at : at + BLOCK] == end_of_text):
            if start < at + mark:
                yield start, at + int(mark)
            start = at + int(mark) + 1
    if start < len(ids):
        yield start, len(ids)


def _print(console: Console, number: int, document: SampleDoc) -> None:
    facts = [f"document {number}", document.name, f"{document.size:,} bytes"]
    if document.tokens:
        about = "" if document.exact else "about "
        facts += [f"{about}{document.tokens:,} tokens", f"{document.size / document.tokens:.2f} bytes a token"]
    console.print(visible(f"\n── {' · '.join(facts)}"), style="bold")
    coloured = console.is_terminal and console.color_system is not None and not console.no_color
    text, before = Text(), False
    for nth, piece in enumerate(document.pieces):
        counts = document.counts is not None and document.counts[nth]
        if not coloured and counts != before:
            text.append("«" if counts else "»")
        elif not coloured and nth and (document.tokens or document.counts is None):
            text.append("│")
        before = counts
        shown = visible(piece, console.encoding)
        for line in (shown.replace("\n", "↵\n") if document.tokens else shown).splitlines(keepends=True):
            style = STYLES[nth % 2] if document.counts is None or counts else "dim"
            text.append(line.rstrip("\n"), style if coloured and (document.tokens or document.counts) else "")
            text.append(line[len(line.rstrip("\n")) :])  # no colour after the end of a line
    text.append("»" if before and not coloured else "")
    console.print(text, end="\n" if document.whole else " …\n")


def _shares(console: Console, source: Source) -> None:
    """Print the kinds of files in a source and its largest folders and files."""
    weights = source.text_bytes if source.size else (1,) * len(source.files)
    kinds, tops = Counter[str](), Counter[str]()
    for name, weight in zip(source.files, weights, strict=True):
        top, slash, _ = name.partition("/")
        tops[top + slash] += weight
        bare = without_query(name, source.root).lower()
        kinds[next(ending for endings in KINDS.values() for ending in endings if bare.endswith(ending))] += weight
    for title, parts in (("kinds of files", kinds), ("folders and files", tops)):
        rows = parts.most_common(TOP)
        rest = parts.total() - sum(weight for _, weight in rows)
        rows += [(f"{len(parts) - TOP} more", rest)] if rest else []
        bars = [(name[-40:], weight, f"{100 * weight / parts.total():.1f} %") for name, weight in rows]
        console.print(horizontal_bars(title, bars), end="")


def _splits(manifest: Manifest) -> Table:
    table = Table("split", box=None, pad_edge=False, header_style="dim")
    for header in ("shards", "tokens", "documents", "bytes per token"):
        table.add_column(header, justify="right")
    for split in ("train", "validation"):
        shards = manifest.of(split)
        tokens = sum(shard.tokens for shard in shards)
        documents = sum(shard.documents for shard in shards)
        ratio = sum(shard.bytes for shard in shards) / max(1, tokens)
        table.add_row(split, f"{len(shards):,}", f"{tokens:,}", f"{documents:,}", f"{ratio:.2f}")
    return table


def _cleaning_so_far(folder: Path, manifest: Manifest) -> Cleaning | None:
    """What the cleaning of a belt has read and removed up to its newest shard; None before the first one."""
    places = _places(folder)
    return cleaning_of(manifest.cleaned_by, (place.tally for place in places)) if places else None


def _skipped_so_far(folder: Path) -> Counter[str]:
    """Files that a belt could not read to their end, by ending."""
    return sum((Counter(dict(place.skipped)) for place in _places(folder)), Counter())


def _manifest(folder: Path) -> Manifest:
    """The manifest of a folder of shards; that of a belt with the training shards that lie there now, which only the
    notes beside them name."""
    manifest, made = Manifest.read(folder), (Made.read(path).shard for path in _notes(folder))
    there = tuple(shard for shard in made if (folder / shard.file).exists())
    return manifest.model_copy(update={"shards": there + manifest.shards})


def _notes(folder: Path) -> list[Path]:
    """The notes beside the shards of a belt, in their order."""
    return sorted(folder.glob("train-?????.json"))


def _places(folder: Path) -> tuple[Position, ...]:
    """Where the newest shard of a belt ends, in each of its sources."""
    notes = _notes(folder)
    return Made.read(notes[-1]).following.positions if notes else ()


def verify(folder: Path) -> None:
    """Compare every file of a folder of shards with its manifest. Prints all that differ, then raises UserError."""
    manifest = _manifest(folder)
    console = Console(stderr=True)
    watched = console.is_terminal
    shards = track(manifest.shards, "reading", console=console, transient=True) if watched else manifest.shards
    faults = [fault for shard in shards if (fault := damage(folder, shard))]
    try:
        _own_tokenizer(folder, manifest)
    except UserError as error:
        faults.append(str(error))
    if faults:
        print("\n".join(map(visible, faults)))
        total = len(manifest.shards) + 1
        raise UserError(f"{folder}: {len(faults):,} of {total:,} files damaged or missing; the first: {faults[0]}")
    tokens = sum(shard.tokens for shard in manifest.shards)
    print(f"{counted(len(manifest.shards), 'shard')}, {tokens:,} tokens: every hash is right")


def _own_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.load(path)
    if tokenizer.sha256 != manifest.tokenizer:
        raise UserError(f"{path} is damaged: its sha256 is not the manifest's; prepare again")
    return tokenizer

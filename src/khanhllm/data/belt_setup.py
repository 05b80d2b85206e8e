"""Create a belt: hold out validation text, and write the recipe that the belt worker follows."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from khanhllm.data.belt_notes import RECIPE, Recipe, spool
from khanhllm.data.clean import Cleaner, cleaning_of
from khanhllm.data.executors import say
from khanhllm.data.readers import Reader
from khanhllm.data.shards import MANIFEST, VERSION, Manifest, dtype_for
from khanhllm.data.sources import Source, anchored
from khanhllm.data.tokenizer import Tokenizer
from khanhllm.data.writer import HASHES, Growing, no_text, share_note, single_text, text_hash
from khanhllm.errors import UserError

HELD_OUT = 2**21
"""text held out for validation (bytes), if the source has as much"""
BAD = ("bad", "refuse")
KEPT = 2**31
"""downloads kept for the worker, which reads the source from its beginning again (bytes)"""


def create_belt(
    folder: Path,
    name: str,
    sources: list[tuple[Source, float]],
    tokenizer: Tokenizer,
    validation: float,
    shard_tokens: int,
    most: int,
    patience: float,
    clean: str = "",
) -> None:
    """Create a belt in the existing, empty `folder`: hold out validation texts and write the recipe.

    sources: the components and their shares. Reads them until HELD_OUT bytes are held out. patience: seconds without
    any answer from the network. clean: steps of `clean.py`. Raises UserError if the sources do not have two different
    texts.
    """
    texts, threshold = _validation(folder, name, sources, validation, patience, clean)
    tokenizer.save(folder / "tokenizer.json")
    dtype = dtype_for(tokenizer.vocab_size)
    with Growing(folder / "validation-00000.bin", "validation", dtype) as held:
        for text in texts:
            held.add(tokenizer.end_of_text, np.asarray(tokenizer.encode(text)), len(text.encode()))
    shard = held.shard()
    manifest = Manifest(
        version=VERSION,
        source=name,
        tokenizer=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        dtype=dtype,
        validation=validation,
        train_tokens=0,
        validation_tokens=shard.tokens,
        shards=(shard,),
        cleaning=cleaning_of(clean, ()),
    )
    recipe = Recipe(
        version=VERSION,
        sources=tuple(_deciding(source) for source, _ in sources),
        weights=tuple(weight for _, weight in sources),
        tokenizer=tokenizer.sha256,
        dtype=dtype,
        threshold=threshold,
        held_out=tuple(sorted({text_hash(text.encode()) for text in texts})),
        shard_tokens=shard_tokens,
        most=most,
        clean=manifest.cleaned_by,
    )
    (folder / RECIPE).write_text(recipe.model_dump_json(), encoding="utf-8")
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1, exclude_none=True), encoding="utf-8")


def _deciding(source: Source) -> dict[str, Any]:
    """The fields of a source that decide its shards; `bad` only if it is "skip", so that older belts keep theirs. Its
    name is absolute, as in the config of the run, which can then make the belt again wherever it is called from."""
    fields = asdict(source) | {"name": anchored(source.name)}
    return {key: value for key, value in fields.items() if key != "left_out" and (key, value) != BAD}


def check_names(source: Source) -> None:
    """Raise UserError for a file's name that the recipe, which is JSON, cannot hold."""
    for name in (source.name, source.root, *source.files):
        if name.encode(errors="ignore").decode() != name:
            raise UserError(f"{source.name}: the name {name} is not UTF-8; rename it, or khanhllm prepare the text")


class _Held(NamedTuple):
    """The validation texts of one component."""

    texts: list[str]
    threshold: int
    """texts whose hash is below this are not for training"""
    lowest: int
    highest: int
    """hashes of the texts read"""
    lowest_text: str
    documents: int
    bytes: int
    """read"""
    whole: bool
    """whether these are all texts of the component"""


def _validation(
    folder: Path, name: str, sources: list[tuple[Source, float]], validation: float, patience: float, clean: str
) -> tuple[list[str], int]:
    """The validation texts of all components, and the hash below which no text is for training.

    If none is below it, as in a very small corpus, the text with the lowest hash is held out.
    """
    parts = [
        # a source's own validation split is read once; the worker reads all else again
        _held_out(
            Reader(source, [], None if source.validation else spool(folder, nth), patience, KEPT),
            validation,
            weight * HELD_OUT,
            clean,
        )
        for nth, (source, weight) in enumerate(sources)
    ]
    least = min(parts, key=lambda part: part.lowest)
    if least.lowest == max(part.highest for part in parts) and not any(source.validation for source, _ in sources):
        raise single_text(name, sum(part.documents for part in parts))
    texts = [text for part in parts for text in part.texts] or [least.lowest_text]
    threshold = max(part.threshold for part in parts) if any(part.texts for part in parts) else least.lowest + 1
    if all(part.whole for part in parts):  # else the share is small, as no more than HELD_OUT is needed
        held, total = sum(len(text.encode()) for text in texts), sum(part.bytes for part in parts)
        if note := share_note(held, total, validation, sum(part.documents for part in parts)):
            say(note)
    return texts, threshold


def _held_out(reader: Reader, validation: float, most: float, clean: str) -> _Held:
    """Hold out about `most` bytes of one component, from its own validation split if it has one."""
    source = reader.source
    threshold = 0 if source.validation else int(validation * HASHES)
    files = source.validation or source.files
    texts: list[str] = []
    size, lowest, highest, lowest_text = 0, HASHES, -1, ""
    documents = read_bytes = 0
    whole = not source.validation
    read = (document.text for name in files for document in reader.read_file(name))
    for text, _ in Cleaner(clean).run(read):
        raw = text.encode()
        value = text_hash(raw)
        highest = max(highest, value)
        documents += 1
        read_bytes += len(raw)
        if value < lowest:
            lowest, lowest_text = value, text
        if source.validation or value < threshold:
            texts.append(text)
            size += len(raw)
        if size >= most and lowest < highest:
            whole = False
            break
    if lowest == HASHES:
        raise no_text(source.name, clean, bool(reader.skipped))
    return _Held(texts, threshold, lowest, highest, lowest_text, documents, read_bytes, whole)

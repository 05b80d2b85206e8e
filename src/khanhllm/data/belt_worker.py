"""The belt worker, which makes a belt's shards; run as a program, it is the child process of `belt`.

It reads the source in its fixed order and publishes one shard after the other, each by a rename, with a note beside it
of its sha256 and of where the next shard begins. So it can make any shard again, byte for byte, from the note before.

A source may be a mixture. Then the next document always comes from the component that is furthest behind its share of
the bytes so far, and a component that ends begins again.

    belt.json   manifest.json   tokenizer.json   validation-00000.bin   train-00000.bin   train-00000.json   ...
"""

import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import psutil

from khanhllm.data.belt_notes import GLANCE, RECIPE, Made, Position, Recipe, ShardStart, note_path, spool
from khanhllm.data.clean import Cleaner
from khanhllm.data.heartbeat import WORK, beat, heartbeat_path
from khanhllm.data.readers import Reader
from khanhllm.data.shards import Manifest
from khanhllm.data.sources import Source
from khanhllm.data.tokenizer import Tokenizer
from khanhllm.data.writer import Growing, batched, text_hash
from khanhllm.errors import UserError, in_a_line
from khanhllm.files import locked, publish, signed, sync
from khanhllm.limits import cores

LEFT_OVER = 86_400.0
"""seconds without a change after which a file of another machine's worker has no owner"""
Encoded = tuple[np.ndarray, int, ShardStart]
"""a document to train on: its ids, its size (bytes), and where the next one begins"""


class BeltWorker:
    """Makes the shards of one belt, in the child process."""

    def __init__(self, folder: Path, patience: float, own: str = "") -> None:
        """own: see `spool`."""
        self.folder = folder
        self.recipe = Recipe.read(folder / RECIPE)
        self.name = Manifest.read(folder).source
        self.sources = [Source(**{**fields, **_tuples(fields)}) for fields in self.recipe.sources]
        self.readers = [
            Reader(source, [], spool(folder, nth, own), patience) for nth, source in enumerate(self.sources)
        ]
        self.tokenizer = Tokenizer.load(folder / "tokenizer.json")
        self.held_out = frozenset(self.recipe.held_out)
        self.read = 0
        """documents read so far, also those skipped; a sign of progress"""
        self.nth = -1
        self.stream: Iterator[tuple[Encoded, bool]] = iter(())

    def make(self, nth: int) -> Made:
        """Publish shard `nth`; the notes of all shards before it must exist. Raises UserError."""
        first = ShardStart(positions=(Position(),) * len(self.sources))
        start = Made.read(note_path(self.folder, nth - 1)).following if nth else first
        if nth != self.nth + 1 or not nth:
            self.stream = _marked_last(self._encoded(start))
        self.nth = nth
        name = f"train-{nth:05d}.bin"
        aside = self.folder / f".{name}.{signed()}"
        following = start
        last = True
        with Growing(aside, "train", self.recipe.dtype) as growing:
            for (ids, size, after), ends in self.stream:
                growing.add(self.tokenizer.end_of_text, ids, size)
                total = start.tokens + growing.tokens
                following = after.model_copy(update={"tokens": total})
                last = ends or 0 < self.recipe.most <= total
                if last or growing.tokens >= self.recipe.shard_tokens:
                    break
        if not growing.tokens:
            raise UserError(f"{self.name} has no text left to train on beyond shard {nth}; remove {self.folder}")
        made = Made(shard=growing.shard(name), following=following, last=last)
        self._publish(aside, made, nth)
        return made

    def _publish(self, aside: Path, made: Made, nth: int) -> None:
        note = note_path(self.folder, nth)
        if note.exists() and Made.read(note) != made:
            aside.unlink()
            raise UserError(
                f"{self.name} has changed since {self.folder / made.shard.file} was made from it; "
                f"the run cannot continue with other text. Begin a new one, with another --data.cache"
            )
        sync(aside)  # a power cut must not leave the name of a shard without its bytes
        aside.replace(self.folder / made.shard.file)
        if not note.exists():
            publish(note, made.model_dump_json(), durable=True)

    def _encoded(self, start: ShardStart) -> Iterator[Encoded]:
        """Documents to train on from `start` on: ids, bytes, and the position after each."""
        threads = cores()
        for batch in batched(self._documents(start), size=lambda item: len(item[0])):
            encoded = self.tokenizer.encode_batch([text for text, _ in batch], threads)
            for (text, after), ids in zip(batch, encoded, strict=True):
                yield ids, len(text.encode()), after

    def _documents(self, start: ShardStart) -> Iterator[tuple[str, ShardStart]]:
        """The texts of all components; the next one is always of the component that is furthest behind its share."""
        weights = self.recipe.weights
        positions = list(start.positions)
        streams = [self._component(nth, position) for nth, position in enumerate(positions)]
        while True:
            nth = min(range(len(streams)), key=lambda nth: positions[nth].bytes / weights[nth])  # the first of equals
            item = next(streams[nth], None)
            if not item:
                return
            text, positions[nth] = item
            yield text, ShardStart(positions=tuple(positions))

    def _component(self, nth: int, start: Position) -> Iterator[tuple[str, Position]]:
        """The texts of one component, and the position after each: one lap if it is the only one, else endlessly."""
        source = self.sources[nth]
        size = start.bytes
        cleaner, skipped = Cleaner(self.recipe.clean, start.tally), Counter(dict(start.skipped))
        for lap in count(start.lap):
            begin = start if lap == start.lap else Position()
            before = size
            for file in range(begin.file, len(source.files)):
                first = begin.document if file == begin.file else 0
                documents = self.readers[nth].read_file(source.files[file])
                notes = tuple(sorted(skipped.items()))
                for number, document in enumerate(documents):
                    self.read += 1
                    if number < first:
                        continue
                    text = cleaner.clean(document.text)
                    raw = text.encode()
                    value = text_hash(raw)
                    if text and value >= self.recipe.threshold and value not in self.held_out:
                        size += len(raw)
                        place = {"lap": lap, "file": file, "document": number + 1}
                        yield text, Position(**place, bytes=size, tally=cleaner.tally, skipped=notes)
                if not lap:  # later ones skip the same
                    skipped.update(self.readers[nth].skipped)
                self.readers[nth].skipped.clear()
            if len(self.sources) == 1:
                return
            if size == before and (begin.file, begin.document) == (0, 0):
                raise UserError(f"{source.name} has no text to train on besides what is held out; give more of it")


def _marked_last(documents: Iterator[Encoded]) -> Iterator[tuple[Encoded, bool]]:
    """Each document, and whether it is the last."""
    following = next(documents, None)
    while following:
        document, following = following, next(documents, None)
        yield document, not following


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}


def serve(folder: Path, ahead: int, disk: int, patience: float, wanted: Callable[[], int], own: str = "") -> None:
    """Keep shards ready: the one in use and `ahead` after it. Remove others beyond `disk` bytes. own: see `spool`."""
    turns, worker = 0, None

    def sign() -> tuple[int, ...]:
        return turns, worker.read if worker else 0, *_sizes(folder / "spool")

    beat(heartbeat_path(folder, os.getpid()), sign, patience + WORK)
    worker = BeltWorker(folder, patience, own)
    notes: list[Made] = []
    while True:
        turns += 1
        while note_path(folder, len(notes)).exists() and not (notes and notes[-1].last):
            notes.append(Made.read(note_path(folder, len(notes))))
        whole = bool(notes) and notes[-1].last
        now = max(0, wanted())
        window = [(now + more) % len(notes) if whole else now + more for more in range(ahead + 1)]
        missing = [nth for nth in window if nth >= len(notes) or not _exists(folder, notes[nth])]
        if missing:
            # a shard begins where the one before it ended, so notes come in order
            worker.make(min(missing[0], len(notes)))
            _clear(folder, notes, window, disk)
        else:
            time.sleep(GLANCE)


def _sizes(downloads: Path) -> list[int]:
    """Sizes of the unfinished downloads (bytes)."""
    sizes = []
    for path in downloads.rglob("*.part"):
        with suppress(FileNotFoundError):  # it has just become complete
            sizes.append(path.stat().st_size)
    return sizes


def _clear(folder: Path, notes: list[Made], window: list[int], disk: int) -> None:
    sizes = {}
    for nth, note in enumerate(notes):
        with suppress(FileNotFoundError):  # gone, perhaps just now, by the worker of another run
            sizes[nth] = (folder / note.shard.file).stat().st_size
    spare = sorted((nth for nth in sizes if nth not in window), key=lambda nth: (nth > window[0], nth))
    while spare and sum(sizes.values()) > disk:
        nth = spare.pop(0)
        with suppress(PermissionError):  # Windows keeps what another run maps; it goes on to count
            (folder / notes[nth].shard.file).unlink(missing_ok=True)
            del sizes[nth]


def _exists(folder: Path, note: Made) -> bool:
    return (folder / note.shard.file).exists()


def own_place(folder: Path, held: ExitStack) -> str:
    """Where in the spool this worker downloads. A reader removes what it has read, so the worker of a second run on the
    same cache has a place of its own. held: keeps the spool for this worker."""
    with suppress(OSError, UserError):
        held.enter_context(locked(folder / "spool.lock"))
        return ""
    return f"of.{signed()}"


def tidy(folder: Path) -> None:
    """Remove what the dead of this machine left, and what nobody has touched for a day: a container that is started
    again has another name."""
    clock = heartbeat_path(folder, os.getpid())
    clock.touch()
    now = clock.stat().st_mtime  # by the clock of the disk, which all machines share
    for left_over in [*folder.glob(".train-*"), *folder.glob("spool/of.*")]:
        process = int(left_over.name.partition("@")[0].rpartition(".")[2])
        own = left_over.name.endswith(f".{signed(process)}")
        with suppress(FileNotFoundError):  # another worker tidies too
            if not psutil.pid_exists(process) if own else now - left_over.stat().st_mtime > LEFT_OVER:
                shutil.rmtree(left_over, ignore_errors=True) if left_over.is_dir() else left_over.unlink()


def main(arguments: list[str]) -> int:
    """The child process: reads the number of the shard in use from stdin, one a line, and ends when stdin does."""
    newest = [0]

    def listen() -> None:
        for line in sys.stdin:
            newest[0] = int(line)
        os._exit(0)  # the training has ended

    folder, ahead, disk, patience = Path(arguments[0]), int(arguments[1]), int(arguments[2]), float(arguments[3])
    Thread(target=listen, daemon=True).start()
    try:
        tidy(folder)
        with ExitStack() as held:
            serve(folder, ahead, disk, patience, lambda: newest[0], own_place(folder, held))
    except OSError as error:
        line, code = f"cannot make shards in {folder}: {error.strerror or error}", 75
    except Exception as error:  # nobody reads the stderr of this process
        line, code = in_a_line(error)
    print(line)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

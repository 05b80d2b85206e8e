"""The belt: shards of a large or distant source, made just ahead of the training that uses them.

A child process, `belt_worker`, keeps a few shards ready. After a crash it continues from the last published shard. It
removes shards that were trained on once they fill more disk than allowed, since it can make any of them again.

The order of rows is the shards in order, the rows of each permuted by a pure function of (seed, lap, shard): the whole
position of a run remains one integer, the number of rows trained on.
"""

import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import suppress
from hashlib import sha256
from itertools import count, takewhile
from pathlib import Path
from threading import Event

import numpy as np

from khanhllm.data.belt_notes import GLANCE, RECIPE, Made, Recipe, note_path
from khanhllm.data.heartbeat import Heartbeat
from khanhllm.data.shards import Manifest, shuffled, too_short
from khanhllm.errors import UserError
from khanhllm.files import quoted

TRIES = 3
"""times in a row, without a new shard, that a dead child is replaced; one that hangs is killed first"""


class Starved(UserError):
    """The belt cannot continue; the training saves and stops."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later

    def at(self, step: int, run: Path) -> "Starved":
        """The same, with what is saved and how to go on from there."""
        return Starved(f"{self} (at step {step}; to continue: --resume --run {quoted(run)})", self.exit_code)


class Belt:
    """The training rows of a belt. Iterating over `rows_from` runs the child that makes them."""

    def __init__(self, folder: Path, context: int, ahead: int, disk: int, patience: float, rank: int = 0) -> None:
        """rank: of this process among those that read the same rows; the first has the shards made."""
        self.folder = folder
        self.context = context
        self.recipe = Recipe.read(folder / RECIPE)
        manifest = Manifest.read(folder)
        self.source = manifest.source
        self.vocab_size = manifest.vocab_size
        if len(self.recipe.weights) > 1 and self.recipe.shard_tokens <= context:  # else it makes shards for ever
            raise UserError(too_short(self.recipe.shard_tokens, context))
        self._settings = [str(ahead), str(disk), str(patience)]
        self._makes = rank == 0

    @property
    def sha256(self) -> str:
        """Identity of all shards of the belt."""
        return self.recipe.identity

    def describe(self) -> str:
        """The source and place of the belt, in words."""
        return f"{self.source}, turned into shards during the training, in {self.folder}"

    def laps(self, tokens: int) -> float:
        """How often a run of so many tokens reads the whole source; 0 while its end is not known."""
        rows = 0
        for path in takewhile(Path.exists, (note_path(self.folder, nth) for nth in count())):
            made = Made.read(path)
            rows += self._rows(made)
            if made.last:
                return tokens / max(1, rows * self.context)
        return 0

    def rows_from(self, cursor: int, seed: int, stopped: Event) -> Generator[np.ndarray]:
        """Yield rows of context + 1 ids, int64, from number `cursor` of the run on, until `stopped` is set.

        Raises Starved if the child cannot continue.
        """
        left = cursor
        with (_Child if self._makes else _Onlooker)(self.folder, self._settings) as child:
            for lap in count():
                rows_before = left
                for nth in count():
                    made = child.wait(note_path(self.folder, nth), nth, stopped)
                    if made is None or stopped.is_set():
                        return
                    rows = self._rows(made)
                    if left < rows:
                        yield from self._window(child, nth, made, seed, lap, left, stopped)
                        if stopped.is_set():
                            return
                    left = max(0, left - rows)
                    if made.last:
                        break
                if left == rows_before and not any(self._rows(note) for note in child.notes.values()):
                    raise Starved(f"{self.folder} has not one row of {self.context + 1} tokens; take more text")

    def _rows(self, made: Made) -> int:
        return (made.shard.tokens - 1) // self.context

    def _window(
        self, child: "_Child", nth: int, made: Made, seed: int, lap: int, start: int, stopped: Event
    ) -> Iterator[np.ndarray]:
        path = self.folder / made.shard.file
        child.want(nth)
        while True:
            child.wait(path, nth, stopped)
            if stopped.is_set():
                return
            try:
                ids = np.memmap(path, dtype=np.dtype(self.recipe.dtype).newbyteorder("<"), mode="r").view(np.ndarray)
            except FileNotFoundError:  # the child removed it before it read that this shard is in use
                continue
            except ValueError:  # it is empty, or ends with a part of an id
                ids = np.empty(0)
            break
        if sha256(ids.data).hexdigest() != made.shard.sha256:
            del ids  # Windows removes no file that is mapped
            path.unlink(missing_ok=True)
            raise Starved(f"{path} is damaged and was removed; --resume makes it again")
        rows = self._rows(made)
        for index in range(start, rows):
            at = shuffled(index, rows, seed, (lap << 32) + nth) * self.context
            row = ids[at : at + self.context + 1]
            if row.max() >= self.vocab_size:
                raise Starved(f"{path} holds an id beyond the vocabulary; remove the folder")
            yield row.astype(np.int64)


class _Child:
    """The training's side of the belt worker, whose process ends when this closes its pipe."""

    def __init__(self, folder: Path, settings: list[str]) -> None:
        self.folder = folder
        self.settings = settings
        self.notes: dict[int, Made] = {}
        self.deaths = 0
        self.wanted = -1

    def __enter__(self) -> "_Child":
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.heartbeat.forget()

    def _start(self) -> None:
        command = [sys.executable, "-m", "khanhllm.data.belt_worker", str(self.folder), *self.settings]
        # a session of its own: Ctrl-C reaches only the training, which ends the child by closing the pipe
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self.heartbeat = Heartbeat(self.folder, self.process.pid)
        if self.wanted >= 0:
            self._send(self.wanted)

    def want(self, nth: int) -> None:
        """Send the number of the shard in use."""
        if nth != self.wanted:
            self.wanted = nth
            self._send(nth)

    def _send(self, nth: int) -> None:
        assert self.process.stdin
        with suppress(BrokenPipeError):  # the next wait notices the death
            self.process.stdin.write(f"{nth}\n".encode())
            self.process.stdin.flush()

    def wait(self, path: Path, nth: int, stopped: Event) -> Made | None:
        """Wait for a note or a shard. Returns the note; None if `stopped` was set before it was read."""
        while not path.exists() and not stopped.is_set():
            self._look_after(nth)
            stopped.wait(GLANCE)
        self.deaths = 0
        if nth not in self.notes and not stopped.is_set():
            self.notes[nth] = Made.read(note_path(self.folder, nth))
        return self.notes.get(nth)

    def _look_after(self, nth: int) -> None:
        self.want(nth)
        if self.process.poll() is not None:
            self._replace()
        elif self.heartbeat.silent():
            self.process.kill()  # ends even a stopped process; the next turn replaces it

    def _replace(self) -> None:
        """Start another child. Raises Starved if the dead one knew what is wrong, or too many have died."""
        message = self.process.communicate()[0].decode("utf-8", "replace").strip()
        self.heartbeat.forget()
        self.deaths += 1
        foreseen = message and self.process.returncode != 1  # as `in_a_line` has it
        if foreseen or self.deaths > TRIES:
            fate = f"died or hung {self.deaths} times in a row"
            code = self.process.returncode if message else None
            raise Starved(message or f"the process that makes shards in {self.folder} {fate}", code)
        self._start()


class _Onlooker(_Child):
    """Waits for shards that the child of another process makes."""

    def __enter__(self) -> "_Onlooker":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def want(self, nth: int) -> None:
        pass

    def _look_after(self, nth: int) -> None:
        pass

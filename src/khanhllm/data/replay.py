"""Rows of a run's own text with rows of an earlier one between them, so that what was learned there is not forgotten.

Row number n of the run is a replayed one whenever n times the share passes a whole number and a half: evenly spread,
and a pure function of n, so that any micro-batch size and a resumed run see the same rows.
"""

from collections.abc import Iterator
from contextlib import closing
from hashlib import sha256
from itertools import count
from pathlib import Path
from threading import Event

import numpy as np

from khanhllm.data.belt import Belt
from khanhllm.data.shards import Shards

PARTS = 2**20
"""the share is rounded to a multiple of one in so many, to count in whole numbers"""


class Replay:
    """The training rows of `own`, a share of them replaced by those of `base`."""

    def __init__(self, own: Shards | Belt, base: Shards | Belt, share: float) -> None:
        self.own, self.base, self.share = own, base, share
        self._parts = round(share * PARTS)

    @property
    def folder(self) -> Path:
        return self.own.folder

    @property
    def vocab_size(self) -> int:
        return self.own.vocab_size

    @property
    def sha256(self) -> str:
        """Identity of the rows of both, and of how they are mixed."""
        return sha256(f"{self.own.sha256} {self.base.sha256} {self._parts}".encode()).hexdigest()

    def describe(self) -> str:
        """The sizes and places of both, in words."""
        return f"{self.own.describe()}, and for {self.share:.0%} of the rows {self.base.describe()}"

    def laps(self, tokens: int) -> float:
        """How often a run of so many tokens reads all rows of its own text."""
        return self.own.laps(round(tokens * (1 - self.share)))

    def rows_from(self, cursor: int, seed: int, stopped: Event) -> Iterator[np.ndarray]:
        """Yield rows from number `cursor` of the run on."""
        old = self._replayed(cursor)
        with (
            closing(self.own.rows_from(cursor - old, seed, stopped)) as own,
            closing(self.base.rows_from(old, seed, stopped)) as base,
        ):
            for number in count(cursor):
                is_old = self._replayed(number + 1) > self._replayed(number)
                if (row := next(base if is_old else own, None)) is None:
                    return
                yield row

    def _replayed(self, rows: int) -> int:
        """How many of the first `rows` rows are replayed."""
        return (rows * self._parts + PARTS // 2) // PARTS  # half a row ahead, so that rounding turns no 1 of 3 into 0

"""The files that describe a belt: its recipe, and beside each shard a note of where the next one begins."""

from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from khanhllm.data.shards import Dtype, Shard, Tally
from khanhllm.errors import UserError
from khanhllm.files import read

RECIPE = "belt.json"
GLANCE = 0.02
"""seconds between two checks for work"""


class _Stored(BaseModel):
    """Something stored as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file. Raises UserError if it is missing or damaged."""
        try:
            return cls.model_validate_json(read(path))
        except (OSError, ValidationError) as error:
            raise UserError(
                f"{path} cannot be read ({type(error).__name__}); remove the folder {path.parent}"
            ) from None


class Recipe(_Stored):
    """All that decides the bytes of the shards."""

    version: int
    sources: tuple[dict[str, Any], ...]
    weights: tuple[float, ...]
    """share of each source in the bytes trained on; they sum to 1"""
    tokenizer: str
    """sha256"""
    dtype: Dtype
    threshold: int
    """texts whose hash is below this are not for training"""
    held_out: tuple[int, ...]
    """hashes of the validation texts"""
    shard_tokens: int
    most: int
    """training tokens in one lap; 0 for all of the source, and no end if it is a mixture"""
    clean: str = ""
    """steps between documents and tokens"""

    @property
    def identity(self) -> str:
        """Hash of all that decides the shards. Keys at their defaults do not count, so older recipes keep theirs."""
        return sha256(self.model_dump_json(exclude_defaults=True).encode()).hexdigest()


class Position(_Stored):
    """How far one component has been read."""

    lap: int = 0
    file: int = 0
    document: int = 0
    bytes: int = 0
    """of text trained on so far, in all its laps"""
    tally: Tally = ()
    """what cleaning read and removed so far, in all its laps"""
    skipped: tuple[tuple[str, int], ...] = ()
    """files so far that could not be read to their end, by ending, and conversations (data.bad = skip)"""


class ShardStart(_Stored):
    """Where the next shard begins."""

    positions: tuple[Position, ...]
    """one for each component"""
    tokens: int = 0
    """made so far in this lap"""


class Made(_Stored):
    """The note beside a published shard."""

    shard: Shard
    following: ShardStart
    last: bool
    """whether the source ends with this shard, and then begins again"""


def spool(folder: Path, nth: int, own: str = "") -> Path:
    """The folder for downloads of component `nth`; each has its own, as two may read the same file at a time. own: the
    place of a second worker in the spool."""
    return folder / "spool" / own / str(nth)


def note_path(folder: Path, nth: int) -> Path:
    """The file of the note beside shard `nth`."""
    return folder / f"train-{nth:05d}.json"

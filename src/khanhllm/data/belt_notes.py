"""What a belt's folder says about itself: the recipe of its shards, and beside each shard a note of where the next one
begins."""

from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from khanhllm.data.shards import Dtype, Shard, Tally
from khanhllm.errors import UserError
from khanhllm.files import read

RECIPE = "belt.json"
GLANCE = 0.02
"""seconds between two looks for work"""


class _Kept(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def read(cls, path: Path) -> Any:
        try:
            return cls.model_validate_json(read(path))
        except (OSError, ValidationError) as error:
            raise UserError(
                f"{path} cannot be read ({type(error).__name__}); remove the folder {path.parent}"
            ) from None


class Recipe(_Kept):
    """All that decides the bytes of the shards."""

    version: int
    sources: tuple[dict[str, Any], ...]
    weights: tuple[float, ...]
    """share of each source in the bytes trained on; they sum to 1"""
    tokenizer: str
    """sha256"""
    dtype: Dtype
    threshold: int
    """texts with a hash below it are not trained on"""
    held_out: tuple[int, ...]
    """hashes of the validation texts"""
    shard_tokens: int
    most: int
    """training tokens in one lap; 0 for all of the source, and no end if it is a mixture"""
    clean: str = ""
    """steps between documents and tokens"""

    @property
    def identity(self) -> str:
        """Of all that will ever come off the belt; a recipe without a later key's default is the same one."""
        return sha256(self.model_dump_json(exclude_defaults=True).encode()).hexdigest()


class Position(_Kept):
    """How far one component has been read."""

    lap: int = 0
    file: int = 0
    document: int = 0
    bytes: int = 0
    """of text trained on so far, in all its laps"""
    tally: Tally = ()
    """what cleaning read and removed so far, in all its laps"""


class ShardStart(_Kept):
    """Where the next shard begins."""

    positions: tuple[Position, ...]
    """one for each component"""
    tokens: int = 0
    """made so far in this lap"""


class Made(_Kept):
    """The note beside a published shard."""

    shard: Shard
    following: ShardStart
    last: bool
    """the source ends with it; then it begins again"""


def spool(folder: Path, nth: int) -> Path:
    """Where the downloads of component `nth` of a belt lie; two components may read the same file at a time."""
    return folder / "spool" / str(nth)


def note_path(folder: Path, nth: int) -> Path:
    return folder / f"train-{nth:05d}.json"

"""What `khanhllm experts` found, as the page may show it. The file is data of a run folder, which a stranger may have
written: what does not have the expected form is left out or refused."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from khanhllm.errors import UserError
from khanhllm.files import read
from khanhllm.runs.run import FINDINGS

LARGEST = 2**24
"""bytes"""
Number = Annotated[float, Field(allow_inf_nan=False)]
Name = Annotated[str, Field(max_length=5000)]
"""a source of text is one too, and a mixture of sources is long"""
Lifts = Annotated[list[tuple[Name, Number]], Field(max_length=10)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Cost(_Part):
    share: Number
    error: Number


class Expert(_Part):
    expert: Annotated[int, Field(ge=0, lt=10_000)]
    share: Number
    likes: Annotated[list[Name], Field(max_length=50)] = []
    kinds: Lifts = []
    parts: Lifts = []
    says: Annotated[list[Name], Field(max_length=50)] = []
    closed: Cost | None = None
    removed: Cost | None = None


class Measure(_Part):
    value: Number
    chance: Number


class Layer(_Part):
    layer: Annotated[int, Field(ge=0, lt=10_000)]
    experts: Annotated[list[Expert], Field(max_length=10_000)]
    measures: Annotated[dict[Name, Measure], Field(max_length=50)] = {}
    together: Annotated[list[list[Number]], Field(max_length=10_000)] = []
    off: Cost | None = None
    random: Cost | None = None
    first: Cost | None = None


class Findings(_Part):
    version: Literal[1]
    step: int
    checkpoint: Name
    data: Name
    tokens: int
    tokens_ablated: int = 0
    bits_per_byte: Number
    experts_per_token: int
    layers: Annotated[list[Layer], Field(max_length=1000)]


def findings(run: Path) -> dict[str, Any] | None:
    """The findings in a run folder; None if there are none. Raises UserError if the file is not what it should be."""
    try:
        found = Findings.model_validate(json.loads(read(run / FINDINGS, LARGEST)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) if isinstance(error, ValidationError) else "no JSON"
        told = f"{FINDINGS} in the run is damaged ({where[:100]})"
        raise UserError(f"{told}; write it anew: khanhllm experts RUN") from None
    return found.model_dump()

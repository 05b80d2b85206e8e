"""What is wrong with a value, in one line and in our own words: pydantic's are for programmers."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError

from khanhllm.schema import DEVICE, LAYERS, NAME, SHARES

PATTERNS = {
    LAYERS: "must be 1 to 256 letters, each D (dense) or M (mixture)",
    SHARES: "must be a whole number for each process, such as 3,1",
    DEVICE: "must be auto, cpu, mps, cuda or cuda:N, such as cuda:1",
    NAME: "must have no NUL character",
}
"""what each means"""
SENTENCES = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dict_type": "must be an object",
    "finite_number": "must be a finite number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "greater_than": "must be more than {gt:,}",
    "greater_than_equal": "must be at least {ge:,}",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number, such as 1000 or 10k",
    "int_parsing_size": "must be a whole number of fewer digits",
    "int_type": "must be a whole number",
    "less_than": "must be less than {lt:,}",
    "less_than_equal": "must be at most {le:,}",
    "list_type": "must be a list",
    "missing": "is missing",
    "model_type": "must be a group of keys",
    "string_too_long": "must have at most {max_length:,} characters",
    "string_too_short": "must have at least {min_length:,} characters",
    "string_type": "must be text",
    "string_unicode": "must be text in UTF-8",
    "too_long": "must have at most {max_length:,} items",
    "too_short": "must have at least {min_length:,} items",
}
"""for each type of pydantic's errors, and the facts that come with it"""


def explain(error: ValidationError, kind: type[BaseModel], names: Mapping[str, str]) -> str:
    """The first error in one line: the key, what is allowed, and the given value. names: what the user calls a key."""
    first = error.errors()[0]
    key = _key(first["loc"])
    if first["type"] == "extra_forbidden":
        for part in first["loc"][:-1]:
            kind = kind.model_fields[str(part)].annotation  # type: ignore[assignment]
        known, key = list(kind.model_fields), ".".join(str(part)[:60] for part in first["loc"])
        return f"unknown key {key}{did_you_mean(str(first['loc'][-1])[:60], known)}; known: {', '.join(known)}"
    same = [sentence(other) for other in error.errors() if _key(other["loc"]) == key]  # one for each type
    message = same[0] + "".join(f", or {text.removeprefix('must be ')}" for text in dict.fromkeys(same[1:]))
    place, given = f"{names.get(key, key)}: " if key else "", first["input"]  # none for what several keys say together
    return place + message + ("" if isinstance(given, Mapping | BaseModel) else f" (got {_shown(given)})")


def _key(loc: tuple[str | int, ...]) -> str:
    """The key at a place; what is no name, and what comes later, is the type that pydantic tried."""
    return ".".join(str(part)[:60] for part in loc[:2] if str(part).replace("_", "").isalnum() or part == loc[0])


def sentence(error: Any) -> str:
    """What one of pydantic's errors says."""
    kind, facts = error["type"], {name: _plain(fact) for name, fact in error.get("ctx", {}).items()}
    if kind == "string_pattern_mismatch":
        return PATTERNS.get(facts["pattern"], "is not spelled as it must be")
    if kind == "literal_error":
        return f"must be {facts['expected'].replace(chr(39), '')}"
    text = SENTENCES[kind].format(**facts) if kind in SENTENCES else error["msg"].removeprefix("Value error, ")
    return text if text.startswith("must") else f"{text[:1].lower()}{text[1:]}"


def _plain(fact: Any) -> Any:
    """1 instead of 1.0."""
    return int(fact) if isinstance(fact, float) and fact.is_integer() else fact


def _shown(given: Any) -> str:
    try:
        return repr(str(given)[:60])
    except ValueError:  # more digits than Python converts
        return "a number of thousands of digits"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question with the known word nearest to `word`, in parentheses; empty if none is near."""
    close = get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""

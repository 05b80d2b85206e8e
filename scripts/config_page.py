"""Write docs/config.md from the schema: every key with its default, what is allowed, and its explanation.

    python scripts/config_page.py

tests/docs/test_docs.py compares the committed page with what this renders.
"""

import re
from pathlib import Path
from typing import Any

from khanhllm.schema import Config, Sampling, Section

PAGE = Path(__file__).parents[1] / "docs" / "config.md"
HEAD = """\
<!-- scripts/config_page.py writes this page; edit src/khanhllm/schema.py instead. -->
# Every key

A run is decided by one configuration. Its values come from a preset, perhaps a TOML file (`--config`), and perhaps
single keys on the command line (`--section.key VALUE`); later ones win. From Python, pass `**{"section.key": value}`.
The run folder keeps all values in `config.toml`. A wrong key, type or range is one line that names the key and what is
allowed, before any download or GPU work.

The defaults below are those of the package; a preset changes some of them.
"""
PATTERNS = {
    r"^[DM]{1,256}$": "1 to 256 letters `D` or `M`",
    r"^(auto|cpu|mps|cuda(:[0-9]{1,3})?)$": "`auto`, `cpu`, `mps`, `cuda`, `cuda:N`",
}
SAMPLING = "How `khanhllm generate` draws tokens (`--temperature 0.7`). These keys are no part of a run."


def render() -> str:
    """The whole page."""
    kinds: dict[str, Any] = {name: field.annotation for name, field in Config.model_fields.items()}
    pages = [HEAD, *(_section(name, kind) for name, kind in kinds.items()), _section("sampling", Sampling, SAMPLING)]
    return "\n".join(pages)


def _section(name: str, kind: type[Section], text: str = "") -> str:
    lines = [
        f"## {name}",
        "",
        *([text, ""] if text else []),
        "| key | default | allowed | explanation |",
        "|---|---|---|---|",
    ]
    for key, shape in kind.model_json_schema()["properties"].items():
        default = _code(shape["default"]) if shape["default"] != "" else "empty"
        explanation = _plain(kind.model_fields[key].description or "")
        lines.append(f"| `{key}` | {default} | {_allowed(shape)} | {explanation} |")
    return "\n".join([*lines, ""])


def _allowed(shape: dict[str, Any]) -> str:
    """What the schema accepts, in words."""
    if "anyOf" in shape:
        return ", or ".join(_allowed(one) for one in shape["anyOf"])
    if choices := shape.get("enum", [shape["const"]] if "const" in shape else []):
        return ", ".join(_code(choice) for choice in choices)
    if shape["type"] == "boolean":
        return "`true`, `false`"
    if shape["type"] == "string":
        return _text(shape)
    return ("" if shape["type"] == "number" else "integer, ") + _range(shape)


def _text(shape: dict[str, Any]) -> str:
    pattern = shape.get("pattern", "")
    return PATTERNS[pattern] if pattern in PATTERNS else f"text, at most {shape['maxLength']:,} characters"


def _range(shape: dict[str, Any]) -> str:
    words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    if "minimum" in shape and "maximum" in shape:
        return f"{_number(shape['minimum'])} to {_number(shape['maximum'])}"
    return ", ".join(f"{word} {_number(shape[bound])}" for bound, word in words.items() if bound in shape)


def _number(value: float) -> str:
    """1,000 and 0.5; powers of two beyond a million as such, for nobody counts their digits."""
    if value == int(value) and value > 2**20 and int(value).bit_count() == 1:
        return f"2^{int(value).bit_length() - 1}"
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"


def _code(value: Any) -> str:
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, int) and value >= 10_000:
        return f"`{value:_}`"
    return f"`{value}`"


def _plain(text: str) -> str:
    """One line that Markdown shows as it stands; what is in backticks stays code."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(
        part if place % 2 else re.sub(r"([\\*_\[\]<>|{}#])", r"\\\1", part) for place, part in enumerate(parts)
    )


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")

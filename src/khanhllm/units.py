"""Numbers as people write them: 10k, 300M, 1e5, 8GB, 1d12h; and numbers, sizes and times as people read them."""

import re
from decimal import Decimal
from typing import Any

from khanhllm.errors import UserError

TIMES = {"s": 1, "m": 60, "h": 3600, "d": 86400}
POWERS = "kmgt"
TOO_LONG = 100
"""characters of a text that no number needs"""


def seconds(given: Any, name: str) -> float:
    """480s, 90m, 8h, 1d12h -> seconds. UserError, with the name of the argument, for anything else, and for 0."""
    match = re.fullmatch(r"(?:[0-9]+(?:\.[0-9]+)?[smhd])+", str(given)[:TOO_LONG].strip().lower())
    parts = re.findall(r"([\d.]+)([smhd])", match[0]) if match else ()
    if not (total := sum(float(number) * TIMES[unit] for number, unit in parts)):
        raise UserError(f"{name}: must be a time above 0, such as 480s, 90m, 8h or 1d12h (got {str(given)[:60]!r})")
    return total


def whole(text: str) -> int | None:
    """10k, 300M, 5B (billions), 1e5, 1_000_000, 8GB -> the whole number; None for anything else."""
    plain = text.strip().lower().replace("_", "")
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(?:e([0-9]{1,2}))?(b|([kmgt])b?)?", plain)
    if not found or len(plain) > TOO_LONG:
        return None
    power = 3 if found[3] == "b" else 1 + POWERS.find(found[4] or "?")
    number = Decimal(f"{found[1]}e{int(found[2] or 0) + 3 * power}")
    return int(number) if int(number) == number else None


def amount(given: Any, name: str) -> int:
    """300M, 5B, 1_000_000 -> a number. UserError, with the name of the argument, for anything else."""
    if (number := whole(str(given))) is None:
        raise UserError(f"{name}: must be a number, such as 300M, 5B or 1000000 (got {str(given)[:60]!r})")
    return number


def as_size(number: float) -> str:
    """A number of bytes with three digits or so: 1 byte, 812 bytes, 48 kB, 1.2 GB."""
    for power in range(len(POWERS), 0, -1):
        if number >= 1000**power:
            part = number / 1000**power
            return f"{part:,.{0 if part >= 10 else 1}f} {POWERS[power - 1].upper().replace('K', 'k')}B"
    return "1 byte" if number == 1 else f"{number:,.0f} bytes"


def short(number: float) -> str:
    """A number with a unit and one decimal: 950, 12.3 k, 692.2 M, 1.5 B."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= 0.99995 * size:
            return f"{number / size:.1f}".removesuffix(".0") + unit
    return f"{number:.3g}" if number % 1 else f"{number:.0f}"


def counted(number: int, word: str) -> str:
    """A number and its noun: 1 file, 2,000 files."""
    return f"{number:,} {word}{'s' * (number != 1)}"


def duration(seconds: float) -> str:
    """A time in its two largest units: 45s, 3m12s, 2h05m, 3d04h."""
    total = round(seconds)
    for size, unit, part, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if total >= size:
            return f"{total // size}{unit}{total % size // part:02}{smaller}"
    return f"{total}s"

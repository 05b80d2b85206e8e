"""Draw numbers as text: the loss as a curve, the experts of a layer as a row of small columns.

A braille character holds 2 x 4 dots, so a line of 70 draws a curve through 140 points. Eighths of a block make columns,
one per expert; half height is an even share, so idle and overloaded experts stand out. Colour repeats what the height
shows, and never stands alone. A function that makes strange text harmless is here too. Nothing here depends on a model
or on training.
"""

import math
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from rich.table import Table
from rich.text import Text

Floats = npt.NDArray[np.float64]

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of one braille cell, from the top, left and right
COLUMNS = "▁▂▃▄▅▆▇█"
EIGHTHS = "▏▎▍▌▋▊▉"
FAIR = (2 / 3, 3 / 2)  # times an even share; outside: yellow
FAR = (1 / 4, 2.0)  # outside: red, and a word about it


def on_terminal() -> bool:
    """Whether a person reads the standard output; a program without a console has none."""
    return sys.stdout is not None and sys.stdout.isatty()


def visible(text: str, encoding: str = "utf-8") -> str:
    """The text with its control characters escaped (ESC as \\x1b), except line feeds, tabs, and what joins or parts
    letters in Persian, Hindi and emoji: it moves no other letter."""
    hidden, kept = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}, "\n\t\u00ad\u200c\u200d"
    shown = (c if c in kept or unicodedata.category(c) not in hidden else ascii(c)[1:-1] for c in text)
    return "".join(shown).encode(encoding, "backslashreplace").decode(encoding)


def braille(values: Sequence[float] | Floats, width: int, height: int, low: float, high: float) -> list[str]:
    """A curve through evenly spaced values, as `height` lines of `width` characters. Values outside low to high are
    drawn at the edge."""
    cells = [[0] * width for _ in range(height)]
    last = 4 * height - 1
    levels = [round(level) for level in np.clip((high - _spread(values, 2 * width)) / (high - low) * last, 0, last)]
    for x, (before, level) in enumerate(zip(levels[:1] + levels, levels, strict=False)):
        step = (level > before) - (level < before)
        for y in range(before + step, level + step, step) if step else [level]:
            cells[y // 4][x // 2] |= DOTS[y % 4][x % 2]
    return ["".join(chr(0x2800 + dots) if dots else " " for dots in line) for line in cells]


def _spread(values: Sequence[float] | Floats, places: int) -> Floats:
    """Resample values to `places` points: average neighbours if there are more values, interpolate if fewer."""
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]
    if not len(known):
        return known
    if len(known) <= places:
        return np.interp(np.linspace(0, len(known) - 1, places), np.arange(len(known)), known)
    edges = np.arange(places + 1) * len(known) // places
    return np.add.reduceat(known, edges[:-1]) / np.diff(edges)


def bars(shares: Sequence[float], width: int) -> Text:
    """One column for each expert. If the width is too small, neighbours share one, which shows the least even."""
    text, count = Text(), len(shares)
    fold = max(1, -(-count // max(1, width)))
    thick, gap = next(((t, g) for t, g in ((2, " "), (1, " "), (1, "")) if count * (t + len(g)) <= width + 1), (1, ""))
    for start in range(0, count, fold):
        ratio = max((share * count for share in shares[start : start + fold]), key=_unevenness)
        column = "?" if math.isnan(ratio) else COLUMNS[min(7, max(0, round(4 * ratio) - 1))]
        text.append(column * thick, _colour(ratio)).append(gap if start + fold < count else "")
    return text


def _unevenness(ratio: float) -> float:
    """Distance from an even share: 0 for an even one, the same for half and for double."""
    return abs(math.log(max(ratio, 1e-9)))


def _colour(ratio: float) -> str:
    if FAIR[0] <= ratio <= FAIR[1]:
        return "green"
    return "yellow" if FAR[0] < ratio < FAR[1] else "red"


def horizontal_bars(title: str, rows: Sequence[tuple[str, float, str]], width: int = 40) -> Text:
    """A line with a bar for each label, value and note; the bar of the largest value is `width` characters long."""
    text = Text().append(f"\n{title}\n", "bold")
    wide, largest = max(len(label) for label, _, _ in rows), max(value for _, value, _ in rows)
    for label, value, note in rows:
        full, rest = divmod(math.ceil(8 * width * value / largest), 8)
        text.append(visible(f"  {label:>{wide}} │{'█' * full}{EIGHTHS[:rest][-1:]} {note}\n"))
    return text


def histogram(title: str, values: Sequence[float], step: float = 0.0, most: float = math.inf) -> Text:
    """A histogram in bins of width `step`, with one for all values beyond `most`; without a step, in powers of two."""
    bins = [int(min(value, most) / step) if step else int(value).bit_length() - 1 for value in values]
    counts = Counter(bins)
    rows = [
        (f"{low * step:g}" if step else f"{2**low:,}", counts[low], f"{counts[low]:,}")
        for low in range(min(bins), max(bins) + 1)
    ]
    return horizontal_bars(f"{title}, from", rows)


def expert_table(load_LE: list[list[float]], layers: list[int]) -> Table:
    """A table of how each mixture layer shared its tokens among its experts, with a verdict in words."""
    table = Table(box=None, pad_edge=False, header_style="dim", caption_style="dim", caption_justify="left")
    table.caption = "a column of half height is an even share; balance = experts x sum of squared shares, 1.00 is even"
    table.add_column("layer", justify="right")
    for header in ("tokens per expert", "shares"):
        table.add_column(header, no_wrap=True)
    table.add_column("balance", justify="right", no_wrap=True)
    table.add_column("verdict")
    for layer, shares in zip(layers, load_LE, strict=True):
        balance = len(shares) * sum(share**2 for share in shares)
        measured = math.isfinite(balance)
        ends = f"{100 * min(shares):.0f} to {100 * max(shares):.0f} %" if measured else "–"
        columns = bars(shares, 16 if len(shares) <= 8 else 32)
        table.add_row(str(layer), columns, ends, f"{balance:.2f}" if measured else "–", verdict(shares))
    return table


def verdict(shares: Sequence[float]) -> str:
    """How evenly one layer shares its tokens, in words."""
    ratios = [share * len(shares) for share in shares]
    if not ratios or any(map(math.isnan, ratios)):
        return "not measured"
    busy = [expert for expert, ratio in enumerate(ratios) if ratio >= FAR[1]]
    idle = [expert for expert, ratio in enumerate(ratios) if ratio <= FAR[0]]
    words = [f"leans on {_experts(busy)}"] if busy else []
    words += [f"{_experts(idle)} {'starves' if len(idle) == 1 else 'starve'}"] if idle else []
    even = FAIR[0] <= min(ratios) and max(ratios) <= FAIR[1]
    return "; ".join(words) or ("fair" if even else "a little uneven")


def _experts(which: list[int]) -> str:
    if len(which) > 2:
        return f"{len(which)} experts"
    return f"expert{'s' * (len(which) > 1)} {' and '.join(map(str, which))}"

"""Numbers become pictures: the loss as a curve, the experts as a row of little columns.

Two alphabets draw in a terminal. A braille character holds 2 x 4 dots, so a line of 70 draws a curve through 140
points. Eighths of a block make columns, one per expert, and half height is an even share: a glance tells who is idle
and who carries the layer. Colour says it once more, never alone. What makes numbers short and strange text harmless
is here too. Nothing here knows of a model or of training.
"""

import math
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


def short(number: float) -> str:
    """With a unit, and one digit behind the point: 950, 12.3 k, 692.2 M, 1.5 B."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= 0.99995 * size:
            return f"{number / size:.1f}".removesuffix(".0") + unit
    return f"{number:.3g}" if number % 1 else f"{number:.0f}"


def counted(number: int, word: str) -> str:
    """1 file, 2,000 files."""
    return f"{number:,} {word}{'s' * (number != 1)}"


def duration(seconds: float) -> str:
    """45s, 3m12s, 2h05m, 3d04h."""
    whole = round(seconds)
    for size, unit, part, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part:02}{smaller}"
    return f"{whole}s"


def visible(text: str, encoding: str = "utf-8") -> str:
    """The text with all that could steer a terminal written out (ESC as \\x1b); only line feeds and tabs stay."""
    hidden = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
    shown = (c if c in "\n\t" or unicodedata.category(c) not in hidden else ascii(c)[1:-1] for c in text)
    return "".join(shown).encode(encoding, "backslashreplace").decode(encoding)


def braille(values: Sequence[float] | Floats, width: int, height: int, low: float, high: float) -> list[str]:
    """A curve through evenly spaced values, as `height` lines of `width` characters. What lies outside low to high
    is drawn at the edge."""
    cells = [[0] * width for _ in range(height)]
    last = 4 * height - 1
    levels = [round(level) for level in np.clip((high - _spread(values, 2 * width)) / (high - low) * last, 0, last)]
    for x, (before, level) in enumerate(zip(levels[:1] + levels, levels, strict=False)):
        step = (level > before) - (level < before)
        for y in range(before + step, level + step, step) if step else [level]:
            cells[y // 4][x // 2] |= DOTS[y % 4][x % 2]
    return ["".join(chr(0x2800 + dots) if dots else " " for dots in line) for line in cells]


def _spread(values: Sequence[float] | Floats, places: int) -> Floats:
    """Values over so many places: neighbours averaged where they are many, joined by lines where they are few."""
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]
    if not len(known):
        return known
    if len(known) <= places:
        return np.interp(np.linspace(0, len(known) - 1, places), np.arange(len(known)), known)
    edges = np.arange(places + 1) * len(known) // places
    return np.add.reduceat(known, edges[:-1]) / np.diff(edges)


def bars(shares: Sequence[float], width: int) -> Text:
    """One column for each expert. Too many for the width: neighbours share one, and the least even of them shows."""
    text, count = Text(), len(shares)
    fold = max(1, -(-count // max(1, width)))
    thick, gap = next(((t, g) for t, g in ((2, " "), (1, " "), (1, "")) if count * (t + len(g)) <= width + 1), (1, ""))
    for start in range(0, count, fold):
        ratio = max((share * count for share in shares[start : start + fold]), key=_unevenness)
        column = "?" if math.isnan(ratio) else COLUMNS[min(7, max(0, round(4 * ratio) - 1))]
        text.append(column * thick, _colour(ratio)).append(gap if start + fold < count else "")
    return text


def _unevenness(ratio: float) -> float:
    """0 for an even share; as large for half a share as for a double one."""
    return abs(math.log(max(ratio, 1e-9)))


def _colour(ratio: float) -> str:
    if FAIR[0] <= ratio <= FAIR[1]:
        return "green"
    return "yellow" if FAR[0] < ratio < FAR[1] else "red"


def lying_bars(title: str, rows: Sequence[tuple[str, float, str]], width: int = 40) -> Text:
    """A line for each label, value and note; the bar of the largest value is `width` characters long."""
    text = Text().append(f"\n{title}\n", "bold")
    wide, largest = max(len(label) for label, _, _ in rows), max(value for _, value, _ in rows)
    for label, value, note in rows:
        full, rest = divmod(math.ceil(8 * width * value / largest), 8)
        text.append(visible(f"  {label:>{wide}} │{'█' * full}{EIGHTHS[:rest][-1:]} {note}\n"))
    return text


def histogram(title: str, values: Sequence[float], step: float = 0.0, most: float = math.inf) -> Text:
    """How many values lie in each step, those beyond `most` together; without a step, between powers of two."""
    bins = [int(min(value, most) / step) if step else int(value).bit_length() - 1 for value in values]
    counts = Counter(bins)
    rows = [
        (f"{low * step:g}" if step else f"{2**low:,}", counts[low], f"{counts[low]:,}")
        for low in range(min(bins), max(bins) + 1)
    ]
    return lying_bars(f"{title}, from", rows)


def expert_table(load_LE: list[list[float]], layers: list[int]) -> Table:
    """How the tokens of each mixture layer were shared among its experts, with a verdict in words."""
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
    """Plain words for how one layer's tokens are shared."""
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

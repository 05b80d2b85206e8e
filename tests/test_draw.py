import math
import os
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from khanhllm.draw import bars, braille, expert_table, verdict, visible
from khanhllm.log.pictures import frame, loss_curve_png, loss_curve_text, smooth

HEADER = "step,tokens,loss,val_ce,val_bpb\n"
LOGS = {
    "no file": None,
    "nothing": "",
    "no row": HEADER,
    "one row": HEADER + "1,2048,10.8,,\n",
    "nan": HEADER + "1,2048,nan,,\n2,4096,nan,5,1\n",
    "inf": HEADER + "1,2048,9,inf,\n2,4096,inf,5,1\n3,6000,8,,\n",
    "validated": HEADER + "1,2048,10.8,10.9,4.0\n2,4096,nan,,\n3,6000,9.5,9,3.2\n",
    "cut": HEADER + "1,2048,10.8,,\n2,4096,9.1,,\n3,40",
    "other columns": "a,b\n1,2\n",
    "long": HEADER + "".join(f"{i},{i * 1000},{2 + 8 / i},{'4,1.5' if i % 50 == 0 else ','}\n" for i in range(1, 400)),
}


@pytest.mark.parametrize("name", LOGS)
def test_any_log_can_be_drawn(tmp_path, name):
    log, png = tmp_path / "log.csv", tmp_path / "loss.png"
    if LOGS[name] is not None:
        log.write_text(LOGS[name])
    loss_curve_png(log, png, "x" * 80 + "a $\\broken_$ \x1b[31m")
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 5000
    for width, height in ((76, 14), (40, 6)):
        lines = loss_curve_text(log, width, height).splitlines()
        empty = name in ("no file", "nothing", "no row", "nan", "other columns")
        assert lines == ["no loss was logged yet"] if empty else len(lines) == height
        assert max(map(len, lines)) <= width


def test_the_curve_falls_from_the_upper_left_to_the_lower_right(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text(HEADER + "".join(f"{i},{i * 1000},{10 - i / 10},,\n" for i in range(1, 81)))
    title, *lines = loss_curve_text(log, 60, 12).splitlines()
    assert title == "loss in nats per token, from 9.90"
    marks = [[x for x, char in enumerate(line[8:]) if "⠀" < char <= "⣿"] for line in lines[:-2]]
    assert all(marks) and [min(mark) for mark in marks] == sorted(min(mark) for mark in marks)
    assert lines[0].startswith("  9.50 ┤") and lines[-3].startswith("  2.00 ┤")
    assert lines[-1].split() == ["1", "k", "80", "k", "tokens"]


def test_validations_are_marked_at_their_place(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text(HEADER + "1,0,4,,\n2,500,4,2,1\n3,1000,4,,\n")
    lines = loss_curve_text(log, 49, 8).splitlines()
    assert [(y, line.index("●") - 8) for y, line in enumerate(lines[1:]) if "●" in line] == [(4, 20)]


def test_a_braille_line():
    assert braille([0, 1], 4, 1, 0, 1) == ["⣀⠤⠒⠉"]
    assert braille([0, 0, 1, 1], 2, 1, 0, 1) == ["⣀⠏"]
    assert braille([], 3, 2, 0, 1) == ["   ", "   "]
    assert braille([math.nan, 5, math.nan], 2, 1, 0, 1) == ["⠉⠉"], "what is too high is drawn at the edge"


def test_frame_leaves_the_first_fall_out():
    assert frame([10, *[3.0] * 50, 2]) == (2, 3)
    assert frame([math.nan]) == (0, 1)
    assert frame([4]) == (3.5, 4.5)


def test_smooth_is_a_mean_of_neighbours():
    line = np.arange(1000.0)
    assert smooth(line)[500] == 500 and smooth(line)[0] == np.mean(line[:11])
    assert smooth(line[:40]).tolist() == line[:40].tolist(), "a short curve is left as it is"


def test_half_height_is_an_even_share():
    assert bars([0.25] * 4, 40).plain == "▄▄ ▄▄ ▄▄ ▄▄"
    assert bars([0.0, 0.25, 0.5, 0.25], 8).plain == "▁ ▄ █ ▄"
    assert bars([0.0, 0.25, 0.5, 0.25], 4).plain == "▁▄█▄"
    assert bars([1 / 64] * 63 + [0.0], 16).plain == "▄" * 15 + "▁", "a starving expert shows among its neighbours"
    assert bars([math.nan] * 2, 5).plain == "?? ??"
    assert [str(span.style) for span in bars([0.25, 0.4, 0.1, 0.6], 40).spans] == ["green", "yellow", "yellow", "red"]


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ([0.25] * 4, "fair"),
        ([0.4, 0.2, 0.2, 0.2], "a little uneven"),
        ([0.1, 0.2, 0.1, 0.6], "leans on expert 3"),
        ([0.125] * 5 + [0.01, 0.18, 0.185], "expert 5 starves"),
        ([0.5, 0.5, 0.0, 0.0], "leans on experts 0 and 1; experts 2 and 3 starve"),
        ([1.0, 0.0, 0.0, 0.0], "leans on expert 0; 3 experts starve"),
        ([math.nan, 0.5], "not measured"),
        ([1.0], "fair"),
        ([], "not measured"),
    ],
)
def test_verdicts(shares, words):
    assert verdict(shares) == words


def test_expert_table():
    with (console := Console(width=80)).capture() as capture:
        console.print(expert_table([[0.25] * 4, [0.1, 0.2, 0.1, 0.6], [math.nan] * 4], [1, 3, 5]))
    lines = [line.split() for line in capture.get().splitlines()]
    assert lines[1] == "1 ▄▄ ▄▄ ▄▄ ▄▄ 25 to 25 % 1.00 fair".split()
    assert lines[2] == "3 ▂▂ ▃▃ ▂▂ ██ 10 to 60 % 1.68 leans on expert 3".split()
    assert lines[3] == "5 ?? ?? ?? ?? – – not measured".split()


def test_visible():
    assert visible("a\tb\nc\x1b[0m é 漢 \u2028\u202e") == "a\tb\nc\\x1b[0m é 漢 \\u2028\\u202e"
    for word in ("می\u200cخواهم", "क्\u200dष", "👩\u200d💻", "Zu\u00adcker"):
        assert visible(word) == word
    for bidi in ("\u200e", "\u200f", "\u202b", "\u2066", "\u2069"):
        assert visible(f"a{bidi}b") == f"a{ascii(bidi)[1:-1]}b"


def test_matplotlib_is_loaded_only_for_the_image():
    code = (
        "import sys, khanhllm.log, khanhllm.draw; print([m for m in sys.modules if m in ('matplotlib', 'tensorboard')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "[]"

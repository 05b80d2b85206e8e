import errno
import io
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from khanhllm.errors import UserError
from khanhllm.log import run_log
from khanhllm.log.run_log import EXPERTS, FILE, Log, columns, lacks_validation
from khanhllm.log.terminal import panel
from khanhllm.schema import Config
from khanhllm.settings import resolve


def config(pattern="DMDM", experts=4, steps=100, every=10, tensorboard=False) -> Config:
    model = {"pattern": pattern, "experts": experts}
    return resolve({"model": model, "train": {"steps": steps}, "log": {"every": every, "tensorboard": tensorboard}})


def row(step: int, layers=2, experts=4, **more) -> dict:
    load = torch.full((layers, experts), 1 / experts)
    return {
        "step": step, "tokens": step * 2048, "loss": torch.tensor(10.0 / step), "lr": 1e-3,
        "balance": torch.tensor(1.0), "router_z": torch.tensor(0.25), "grad_norm": torch.tensor(1 / 3),
        "max_violation": load.max() * experts - 1, "least_share": load.min(),
        "balance_per_layer": experts * (load**2).sum(-1), "load_per_layer": load,
        "tokens_per_s": 3210.44, "mfu": 0.314159, "waiting": 0.0, "memory_mb": 1204.3, "seconds": 0.5 * step,
    } | more  # fmt: skip


def pipe(width=80, encoding="utf-8") -> Console:
    return Console(file=io.TextIOWrapper(io.BytesIO(), encoding=encoding), force_terminal=False, width=width)


def screen(width=80, height=24) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height)


def printed(console: Console) -> str:
    console.file.seek(0)
    return console.file.read()


def lines(run: Path) -> list[str]:
    return (run / FILE).read_text().splitlines()


def write(run: Path, steps, start=0, **options) -> str:
    console = pipe()
    with Log.open(run, config(**options), start_step=start, console=console) as log:
        for step in steps:
            log.add(row(step))
    return printed(console)


def test_columns_are_the_contract():
    assert ",".join(columns(config())) == (
        "step,tokens,loss,balance,router_z,lr,grad_norm,rejected,val_ce,val_bpb,max_violation,least_share,"
        "balance_L1,balance_L3,"
        "tokens_per_s,mfu,waiting,memory_mb,seconds"
    )
    answers = resolve(config().model_dump(), {"train": {"targets": "answers"}})
    assert [name for name in columns(answers) if name not in columns(config())] == ["counted"]


def test_a_row_is_written_one_step_late(tmp_path):
    with Log.open(tmp_path, config(), console=pipe()) as log:
        for step in (1, 2, 3):
            log.add(row(step))
            assert len(lines(tmp_path)) == step, "the header and all rows but the newest"
        log.flush()
        log.flush()
        assert [line.split(",")[0] for line in lines(tmp_path)] == ["step", "1", "2", "3"]
    not_measured = ",,,"
    assert lines(tmp_path)[1] == (
        f"1,2048,10,1,0.25,0.001,0.333333343{not_measured},0,0.25,1,1,3210.4,0.3142,0.0000,1204.3,0.50"
    )


def test_a_row_keeps_the_numbers_of_its_moment(tmp_path):
    norm = torch.tensor(1.5)
    with Log.open(tmp_path, config(), console=pipe()) as log:
        log.add(row(1, grad_norm=norm))
        norm.fill_(99)
    assert ",1.5,," in lines(tmp_path)[1]


def test_the_same_number_has_the_same_text_and_fp32_survives(tmp_path):
    numbers = torch.tensor([1 / 3, 2.7182817, 1e-8, 16777216.0, math.nextafter(1, 2)])
    with Log.open(tmp_path, config(), console=pipe()) as log:
        for step, number in enumerate(numbers, 1):
            log.add(row(step, loss=number, router_z=number.item(), grad_norm=number.double()))
    for line, number in zip(lines(tmp_path)[1:], numbers, strict=True):
        loss, router_z, grad_norm = (line.split(",")[column] for column in (2, 4, 6))
        assert loss == router_z == grad_norm
        assert torch.tensor(float(loss)) == number


def test_resumed_log_is_the_uninterrupted_one(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    write(whole, range(1, 10))
    write(parts, range(1, 8))
    with (parts / FILE).open("a") as file:
        file.write("8,16384,1.2")  # power went away here
    write(parts, range(6, 10), start=5)
    assert (parts / FILE).read_bytes() == (whole / FILE).read_bytes()
    assert {path.name for path in parts.iterdir()} == {FILE, EXPERTS}


def test_the_load_of_each_expert_is_kept_every_few_steps(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    write(whole, range(1, 8), every=2, experts=4)
    table = (whole / EXPERTS).read_text().splitlines()
    assert table[0] == "step,layer,share_0,share_1,share_2,share_3"
    even = ",0.25" * 4
    assert table[1:] == [f"{step},{layer}{even}" for step in (2, 4, 6) for layer in (1, 3)]
    write(parts, range(1, 7), every=2, experts=4)
    with (parts / EXPERTS).open("a") as file:
        file.write("6,1,0.2")  # power went away here
    write(parts, range(6, 8), start=5, every=2, experts=4)
    assert (parts / EXPERTS).read_bytes() == (whole / EXPERTS).read_bytes()
    with Log.open(parts, config(every=2), start_step=7, console=pipe()) as log:
        log.rewind(3)
    assert (parts / EXPERTS).read_text().splitlines() == table[:3]


def test_a_dense_run_has_no_experts_to_tell_of(tmp_path):
    Log.open(tmp_path, config(pattern="DD"), console=pipe())
    assert not (tmp_path / EXPERTS).exists()


def test_a_run_of_before_goes_on_with_the_loads_from_there(tmp_path):
    write(tmp_path, range(1, 5), every=2)
    (tmp_path / EXPERTS).unlink()
    write(tmp_path, range(5, 7), start=4, every=2)
    assert [line.split(",")[0] for line in (tmp_path / EXPERTS).read_text().splitlines()] == ["step", "6", "6"]


def test_half_a_line_is_no_row_even_where_its_step_is_kept(tmp_path):
    write(tmp_path, range(1, 4))
    whole = (tmp_path / FILE).read_text()
    for torn in (whole[:-3], whole + "3", whole + "\0\0\0\n", whole + "2,77\n"):
        (tmp_path / FILE).write_text(torn)
        write(tmp_path, [], start=3)
        assert lines(tmp_path) == whole.splitlines()[: 3 if torn == whole[:-3] else 4]


def test_a_fresh_start_begins_anew_and_a_lost_log_is_begun(tmp_path):
    write(tmp_path, range(1, 4))
    write(tmp_path, range(1, 2))
    assert len(lines(tmp_path)) == 2
    (tmp_path / FILE).unlink()
    write(tmp_path, [6], start=5)
    assert [line.split(",")[0] for line in lines(tmp_path)] == ["step", "6"]


def test_a_fresh_start_does_not_mind_other_columns(tmp_path):
    (tmp_path / FILE).write_text("step,loss\n1,2\n")
    write(tmp_path, [1])
    assert len(lines(tmp_path)) == 2


def test_other_columns_are_refused_and_nothing_is_lost(tmp_path):
    write(tmp_path, range(1, 4))
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(UserError, match="other columns"):
        Log.open(tmp_path, config(pattern="MMMM"), start_step=3, console=pipe())
    assert (tmp_path / FILE).read_bytes() == before


def test_a_full_disk_ends_nothing_and_loses_nothing(tmp_path):
    class Disk(io.FileIO):
        full = False

        def write(self, data):
            if self.full:
                raise OSError(28, "No space left on device")
            return super().write(data)

    console = pipe()
    with Log.open(tmp_path, config(every=100), console=console) as log:
        disk = Disk(tmp_path / FILE, "a")
        log.csv.file = io.BufferedWriter(disk, 1 << 20)
        for step in range(1, 10):
            disk.full = 3 <= step <= 6
            log.add(row(step))
    assert [line.split(",")[0] for line in lines(tmp_path)[1:]] == [str(step) for step in range(1, 10)]
    assert printed(console).count("No space left on device; training continues") == 1


def test_what_was_done_is_written_whatever_ends_the_run(tmp_path):
    console = screen()
    with pytest.raises(KeyboardInterrupt), Log.open(tmp_path, config(), console=console) as log:
        log.add(row(1))
        raise KeyboardInterrupt
    assert len(lines(tmp_path)) == 2
    out = printed(console)
    assert out.rindex("\x1b[?25h") > out.rindex("\x1b[?25l"), "the cursor is shown again"


def test_plain_lines(tmp_path):
    console = pipe()
    with Log.open(tmp_path, config(steps=25), console=console) as log:
        for step in range(1, 26):
            log.add(row(step, **({"val_ce": 4.91, "val_bpb": 1.62} if step == 15 else {})))
            if step in (20, 25):
                log.say("saved")
    told = printed(console).splitlines()
    assert told == [
        "step 10/25  loss 1.0000  lr 1.0e-03  grad 0.33  balance 1.00  3,210 tok/s  mfu 31 %  1,204 MB  ETA 8s",
        "step 15/25  loss 0.6667  val 4.9100 (1.620 bits/byte)  lr 1.0e-03  grad 0.33  balance 1.00  3,210 tok/s"
        "  mfu 31 %  1,204 MB  ETA 5s",
        "step 20/25  loss 0.5000  lr 1.0e-03  grad 0.33  balance 1.00  3,210 tok/s  mfu 31 %  1,204 MB  ETA 2s",
        "saved",
        "step 25/25  loss 0.4000  lr 1.0e-03  grad 0.33  balance 1.00  3,210 tok/s  mfu 31 %  1,204 MB",
        "saved",
    ]


def test_a_run_that_stops_early_tells_its_last_step_once(tmp_path):
    assert [line.split()[1] for line in write(tmp_path, range(1, 14)).splitlines()] == ["10/100", "13/100"]
    assert [line.split()[1] for line in write(tmp_path, range(14, 21), start=13).splitlines()] == ["20/100"]
    assert write(tmp_path, [], start=20) == ""


def test_a_slow_first_step_does_not_count(tmp_path):
    console = pipe()
    with Log.open(tmp_path, config(every=1), console=console) as log:
        for step in (1, 2, 3):
            log.add(row(step, seconds=600.0 + step))
    first, _, third = printed(console).splitlines()
    assert "ETA" not in first and third.endswith("ETA 1m37s")


def test_a_model_without_mixture_layers_or_known_peak(tmp_path):
    console = pipe()
    spare = {"step": 1, "tokens": 9, "loss": 2.0, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 5.0, "mfu": None,
             "memory_mb": 7.0, "seconds": 1.0}  # fmt: skip
    with Log.open(tmp_path, config(pattern="DD", every=1), console=console) as log:
        log.add(spare)
    assert lines(tmp_path)[1] == "1,9,2,,,0.001,1,,,,5.0,,,7.0,1.00"
    assert printed(console) == "step 1/100  loss 2.0000  lr 1.0e-03  grad 1.00  5 tok/s  7 MB\n"


@pytest.mark.parametrize("console", [pipe(), screen(200)], ids=["pipe", "screen"])
def test_text_is_shown_and_never_obeyed(tmp_path, console):
    with Log.open(tmp_path, config(), console=console) as log:
        log.say("[red]a[/red] \x1b]0;b\x07\x1b[31m :smile: \u202ec\x9b2J \x00\ud800 Việt\nnext")
    assert "[red]a[/red] \\x1b]0;b\\x07\\x1b[31m :smile: \\u202ec\\x9b2J \\x00\\ud800 Việt\nnext" in printed(console)


def test_a_long_path_is_not_broken_and_the_panel_stays_whole(tmp_path):
    """So that it can be copied; the terminal wraps the line."""
    console, path = screen(), f"runs/{'a long name/' * 20}"
    with Log.open(tmp_path, config(), console=console) as log:
        log.say(f"saved {path}")
    drawn = Console(file=io.StringIO(), force_terminal=True, width=80)
    drawn.print(panel(log.terminal.story, 80, 24))
    assert f"saved {path}\n{printed(drawn).rstrip()}" in printed(console)


def test_an_output_that_cannot_write_all_letters(tmp_path):
    console = pipe(encoding="ascii")
    with Log.open(tmp_path, config(), console=console) as log:
        log.say("Việt – ●")
    assert printed(console) == "Vi\\u1ec7t \\u2013 \\u25cf\n"


@pytest.mark.parametrize(("width", "height"), [(110, 40), (80, 24), (60, 24), (40, 15)])
@pytest.mark.parametrize(("pattern", "experts"), [("DD", 4), ("DMDM", 8), ("M" * 24, 128)])
def test_the_panel_fits_the_terminal(tmp_path, width, height, pattern, experts):
    console, layers = screen(width, height), pattern.count("M")
    with Log.open(tmp_path, config(pattern, experts), parameters=692_196_352, console=console) as log:
        for stage in range(4):
            seen = Console(file=io.StringIO(), width=width, height=height)
            seen.print(panel(log.terminal.story, width, height))
            drawing = printed(seen).splitlines()
            assert len(drawing) <= height - 1 and max(map(len, drawing)) <= width
            step = stage + 1
            more = {"val_ce": 4.0, "val_bpb": 1.2} if stage else {"loss": torch.tensor(math.nan)}
            log.add(row(step, layers, experts, **more) if layers else {"step": step, "loss": 1.0, **more})
            log.flush()


def test_what_the_panel_tells(tmp_path):
    with Log.open(tmp_path / "..", config(steps=8), parameters=3_141_592, console=screen()) as log:
        for step in (1, 2, 3, 4):
            log.add(row(step, **({"val_ce": 4.0 - step / 10, "val_bpb": 1.6} if step % 2 else {})))
        log.flush()
        seen = Console(file=io.StringIO(), width=80)
        seen.print(panel(log.terminal.story, 80, 24))
    words = " ".join(printed(seen).replace("│", " ").split())
    for fact in (
        f"{tmp_path.parent.name} · 3.1 M parameters", "step 4 / 8", "50 % ETA 2s", "loss 5.2083 last 2.5000",
        "validation 3.7000 1.600 bits per byte best 3.7000", "learning rate 1.0e-03 gradient 0.33",
        "speed 3,210 tokens/s MFU 31 % 1,204 MB", "layer 1 ▄▄ ▄▄ ▄▄ ▄▄ 1.00 layer 3 ▄▄ ▄▄ ▄▄ ▄▄ 1.00",
    ):  # fmt: skip
        assert fact in words


def test_the_panel_is_drawn_a_few_times_a_second_only(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("khanhllm.log.terminal.panel", lambda *_: drawn.append(1) or "panel")
    with Log.open(tmp_path, config(steps=1000), console=screen()) as log:
        for step in range(1, 301):
            log.add(row(step))
    assert 2 <= len(drawn) <= 10


def test_a_resumed_run_remembers_its_curve_and_its_best(tmp_path):
    with Log.open(tmp_path, config(), console=pipe()) as log:
        for step in range(1, 9):
            log.add(row(step, val_ce=3.0 + (step - 4) ** 2, val_bpb=1.0))
    story = Log.open(tmp_path, config(), start_step=7, console=pipe()).terminal.story
    assert list(story.losses) == pytest.approx([10 / step for step in range(1, 8)])
    assert (story.best_ce, story.checked["val_ce"], story.eta) == (3.0, 12.0, "")


def test_tensorboard_gets_every_number_and_forgets_what_is_redone(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, end in ((0, 6), (3, 5)):
        with Log.open(tmp_path, config(tensorboard=True), start_step=start, console=pipe()) as log:
            for step in range(start + 1, end + 1):
                log.add(row(step, novelty=torch.tensor(step + 100.0 * start), note="words"))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("novelty")] == [
        (1, 1), (2, 2), (3, 3), (4, 304), (5, 305)
    ]  # fmt: skip
    assert {"loss", "balance_L1", "mfu"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("back", [0, 1, 3])
def test_a_full_disk_does_not_keep_a_run_from_going_back(back, tmp_path, monkeypatch):
    """Cutting the log takes no room. TensorBoard is told what to forget."""
    purged = []

    def open_board(_run, purge_step):
        purged.append(purge_step)
        return SimpleNamespace(add_scalar=lambda *_: None, close=lambda: None)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_log, "_open_board", open_board)
    with Log.open(tmp_path, config(tensorboard=True), console=pipe()) as log:
        for step in range(1, 14):
            log.add(row(step, **({"val_ce": 5.0 - step} if step in (1, 12) else {})))
        with monkeypatch.context() as patch:
            patch.setattr(run_log, "publish", full)
            log.csv.file.close()
            name = log.csv.file.name
            log.csv.file = SimpleNamespace(name=name, write=full, flush=full, close=full)  # rows wait in its buffer
            log.rewind(back)
        assert log.validations == ({1: 4.0} if back else {})
        for step in range(back + 1, 6):
            log.add(row(step))
    assert [int(line.split(",")[0]) for line in lines(tmp_path)[1:]] == [1, 2, 3, 4, 5]
    assert purged == [None, back + 1]


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"pip install 'khanhllm\[tensorboard\]'"):
        Log.open(tmp_path, config(tensorboard=True), console=pipe())


class Gone(io.StringIO):
    """A terminal that is closed at some moment; then every write fails."""

    gone = False

    def write(self, text):
        if self.gone:
            raise OSError(errno.EIO, "Input/output error")
        return super().write(text)


@pytest.mark.parametrize("moment", ["before", "between", "at the end"])
def test_a_closed_terminal_ends_nothing(tmp_path, moment, monkeypatch):
    monkeypatch.setattr("khanhllm.log.terminal.REDRAW", 0)
    terminal = Gone()
    outputs = sys.stdout, sys.stderr
    terminal.gone = moment == "before"
    console = Console(file=terminal, force_terminal=True, width=80, height=24)
    with Log.open(tmp_path, config(), console=console) as log:
        for step in range(1, 5):
            log.add(row(step))
            terminal.gone = terminal.gone or (moment == "between" and step == 2)
            log.say(f"after step {step}")
        terminal.gone = True
    assert len(lines(tmp_path)) == 5
    assert len((tmp_path / "messages.txt").read_text().splitlines()) == 4
    assert (sys.stdout, sys.stderr) == outputs, "the panel no longer catches what others print"


def test_a_run_without_a_standard_output_is_logged(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with Log.open(tmp_path, config()) as log:
        log.add(row(1))
        log.say("after step 1")
    assert len(lines(tmp_path)) == 2


def test_the_panel_of_a_closed_terminal_leaves_no_write_behind(tmp_path):
    """What stays in the buffer of stdout would fail at the end of the process and make its exit code 120."""
    code = f"""
import errno, os, pty, sys
from pathlib import Path
sys.path[:0] = {[str(Path(__file__).parent)]!r}
from test_run_log import config, row
from khanhllm.log.run_log import Log
master, slave = pty.openpty()
os.dup2(slave, 1)
os.close(slave)
with Log.open(Path({str(tmp_path)!r}), config()) as log:
    assert log.terminal.live
    log.add(row(1))
    os.close(master)
    for step in (2, 3):
        log.terminal.drawn = 0
        log.add(row(step))
print("nobody reads this")
"""
    environment = os.environ | {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(lines(tmp_path)) == 4


def test_a_full_disk_does_not_end_a_run_that_makes_up_for_its_validation(tmp_path, monkeypatch):
    with Log.open(tmp_path, config(), console=pipe()) as log:
        log.add(row(1))
    before, console = lines(tmp_path), pipe()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Log.open(tmp_path, config(), start_step=1, console=console) as log:
        with monkeypatch.context() as patch:
            patch.setattr(run_log, "publish", full)
            log.complete({"val_ce": 2.0, "val_bpb": 1.0})
        log.add(row(2))
    assert "No space left on device; training continues" in printed(console)
    assert lines(tmp_path)[: len(before)] == before and len(lines(tmp_path)) == len(before) + 1


def test_a_missing_validation_is_filled_in(tmp_path):
    """The file is then byte for byte that of a run whose row had it at once."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    score = {"val_ce": 2.7182817, "val_bpb": 1.1, "val_bytes": 7, "val_tokens": 3}
    for folder, last in ((whole, score), (parts, {})):
        with Log.open(folder, config(), console=pipe()) as log:
            for step in (1, 2, 3):
                log.add(row(step, **(last if step == 3 else {})))
    assert lacks_validation(parts, config(), 3) and not lacks_validation(whole, config(), 3)
    assert not lacks_validation(parts, config(), 4)
    console = pipe()
    with Log.open(parts, config(), start_step=3, console=console) as log:
        log.complete(score)
        assert log.terminal.story.best_ce == 2.7182817
        log.add(row(4))
    assert "validation after step 3: 2.7183 (1.100 bits/byte)" in printed(console)
    assert lines(parts)[:4] == lines(whole) and len(lines(parts)) == 5

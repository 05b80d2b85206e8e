"""A log is followed while it grows, is cut back or is half written, in bounded memory."""

import os

import numpy as np
import pytest

from khanhllm.log.run_log import Csv
from khanhllm.serve.watch import POINTS, TAIL, Watch, tail

HEADER = "step,loss,val_ce\n"


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "training_log.csv"
    path.write_text(HEADER)
    return path


def append(path, text):
    with path.open("a") as file:
        file.write(text)


def rows(first, last, val=""):
    return "".join(f"{step},{step / 10},{val}\n" for step in range(first, last))


def points(found, column="step", kind="mean", curve="0"):
    return found["curves"][curve][column][kind]


def test_rows_appear_once_and_a_half_line_waits_until_it_is_whole(log):
    watch = Watch(log)
    assert watch.look()["curves"] == {} and watch.names == ["step", "loss", "val_ce"]
    append(log, "1,0.5,\n2,0.")
    assert points(watch.look()) == [1]
    before = watch.look()["version"]
    assert watch.look()["version"] == before
    append(log, "25,3\n")
    found = watch.look()
    assert points(found) == [1, 2] and points(found, "loss") == [0.5, 0.25] and points(found, "val_ce") == [None, 3]
    assert found["version"] > before and found["last"]["0"] == {"step": 2, "loss": 0.25, "val_ce": 3}
    append(log, "3,1,\n")
    assert watch.look()["last"]["0"] == {"step": 3, "loss": 1, "val_ce": 3}


def test_a_file_that_is_missing_has_no_curves_until_it_comes(tmp_path):
    watch = Watch(tmp_path / "log.csv")
    first = watch.look()
    assert first == {"version": watch.version, "curves": {}, "last": {}}
    assert watch.look(str(first["version"])) == {"version": first["version"]}
    (tmp_path / "log.csv").write_text("st")
    assert watch.look()["curves"] == {} and not watch.names
    (tmp_path / "log.csv").write_text(HEADER + rows(1, 3))
    assert points(watch.look()) == [1, 2]
    (tmp_path / "log.csv").unlink()
    assert watch.look()["curves"] == {}


@pytest.mark.parametrize("grown", [False, True], ids=["shorter", "longer again"])
@pytest.mark.parametrize("anew", [False, True], ids=["in place", "by a rename"])
def test_a_log_that_is_cut_back_is_read_again(log, grown, anew):
    append(log, rows(1, 101))
    watch = Watch(log)
    before = watch.look()
    kept = HEADER + rows(1, 51) + (rows(51, 201, "7") if grown else "")
    if anew:
        aside = log.with_name("aside")
        aside.write_text(kept)
        aside.replace(log)
    else:
        with log.open("r+") as file:
            file.truncate(len(HEADER + rows(1, 51)))
        append(log, kept[len(HEADER + rows(1, 51)) :])
    after = watch.look()
    assert points(after) == list(range(1, 201 if grown else 51))
    assert after["version"] > before["version"]


def test_what_the_log_itself_does_is_followed(tmp_path):
    csv, _ = Csv.open(tmp_path / "log.csv", ["step", "loss"], 0)
    watch = Watch(tmp_path / "log.csv")
    csv.write(*({"step": step, "loss": 1.0} for step in range(1, 9)))
    assert points(watch.look()) == list(range(1, 9))
    csv.cut(5, [])
    csv.write({"step": 6, "loss": 2.0})
    assert points(watch.look(), "loss") == [1, 1, 1, 1, 1, 2]
    csv.file.close()


def test_a_long_log_becomes_few_points_that_hide_no_extreme(log):
    loss = np.sin(np.arange(10_000)) + 2
    loss[7_777] = 99
    append(log, "".join(f"{step},{value},\n" for step, value in enumerate(loss)))
    watch = Watch(log)
    found = watch.look()
    assert POINTS // 2 <= len(points(found)) <= POINTS
    assert max(points(found, "loss", "most")) == 99 and min(points(found, "loss", "least")) == pytest.approx(
        loss.min(), rel=1e-4
    )
    assert points(found, "val_ce") == [None] * len(points(found))
    width = watch.curves[0].width
    expected = [loss[start : start + width].mean() for start in range(0, 10_000, width)]
    assert points(found, "loss") == pytest.approx(expected, rel=1e-4)
    append(log, "10000,1,\n")  # bit by bit as at once
    little = Watch(log)
    assert watch.look()["curves"] == little.look()["curves"]


def test_the_best_validation_is_that_of_a_row_and_no_mean(log):
    log.write_text("step,val_bpb\n" + "".join(f"{step},{1.5 if step == 700 else 2}\n" for step in range(5 * POINTS)))
    found = Watch(log).look()
    assert min(points(found, "val_bpb", "least")) == 1.5 < min(points(found, "val_bpb"))


def test_each_layer_has_its_curve(tmp_path):
    (tmp_path / "experts.csv").write_text("step,layer,share_0\n50,1,0.5\n50,3,0.25\n100,1,0.75\n100,nan,1\n100,-1,1\n")
    found = Watch(tmp_path / "experts.csv", "layer").look()
    assert list(found["curves"]) == ["1", "3"]
    assert points(found, "share_0", curve="1") == [0.5, 0.75] and points(found, curve="3") == [50]


def test_lines_that_are_no_rows_are_skipped(log):
    append(log, "1,2\nx,y,z\n\n2,nan,inf\n" + "\0" * 50 + "\n3,1,1\n")
    found = Watch(log).look()
    assert points(found) == [2, 3] and points(found, "loss") == [None, 1]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes_and_links_are_not_read(tmp_path, log):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(log)
    for name in ("pipe", "link", "."):
        watch = Watch(tmp_path / name)
        assert watch.look()["curves"] == {} and not watch.names and tail(tmp_path / name) == ""


def test_the_end_of_a_text_in_whole_lines(tmp_path):
    text = "".join(f"line {nth} ü\n" for nth in range(20_000))
    (tmp_path / "messages.txt").write_text(text, "utf-8")
    end = tail(tmp_path / "messages.txt")
    assert TAIL - 20 < len(end.encode()) <= TAIL and text.endswith("\n" + end)
    assert tail(tmp_path / "none.txt") == ""

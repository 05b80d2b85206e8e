import sys

import pytest
from matplotlib.figure import Figure

from conftest import tiny
from khanhllm import cli, history
from khanhllm.errors import UserError
from khanhllm.log import compare
from khanhllm.model.twin import dense_twin
from khanhllm.runs.listing import runs_in
from khanhllm.settings import to_toml


def run_folder(path, losses, seconds, model=None):
    path.mkdir()
    config = tiny() if model is None else tiny().model_copy(update={"model": model})
    (path / "config.toml").write_text(to_toml(config), "utf-8")
    lines = [f"{n},{64 * n},{loss},{clock},{1.5 if n == len(losses) else ''}" for n, (loss, clock) in
             enumerate(zip(losses, seconds, strict=True), 1)]  # fmt: skip
    (path / "training_log.csv").write_text("step,tokens,loss,seconds,val_bpb\n" + "\n".join(lines) + "\n")
    return path


def test_a_table_and_a_picture(tmp_path, capsys):
    run_folder(tmp_path / "mixture[v]", [5, 4, 3], [1, 2, 3])
    run_folder(tmp_path / "twin", [5, 4.5, 4], [1, 2, 3], dense_twin(tiny().model))
    png = tmp_path / "out.png"
    assert cli.main(["compare", str(tmp_path / "mixture[v]"), str(tmp_path / "twin"), "--out", str(png)]) == 0
    printed = capsys.readouterr().out
    assert "mixture[v]" in printed and "twin" in printed and "1.5000" in printed
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["_twin", "$\\frac$"])
def test_the_legend_has_each_name_as_it_is(tmp_path, monkeypatch, name):
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: (drawn.append(figure), save(figure, path)))
    logs = [compare.read(run_folder(tmp_path / one, [5, 4], [1, 2])) for one in (name, "other")]
    compare.draw(logs, tmp_path / "x.png")
    told = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert told == [f"{name}: 1.500 bits per byte", "other: 1.500 bits per byte"]


def test_without_a_standard_output_the_picture_is_drawn(tmp_path, monkeypatch):
    run_folder(tmp_path / "run", [5, 4], [1, 2])
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["compare", str(tmp_path / "run"), "--out", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").exists()


def test_runs_of_other_tokenizers_are_told_apart(tmp_path, capsys):
    for place, words in (("x", "a"), ("y", "b")):
        (tmp_path / place).mkdir()
        (run_folder(tmp_path / place / "r", [5, 4, 3], [1, 2, 3]) / "tokenizer.json").write_text(words)
    one, other = tmp_path / "x" / "r", tmp_path / "y" / "r"
    assert cli.main(["compare", str(one), str(other), "--out", str(tmp_path / "out.png")]) == 0
    assert "different tokenizers: compare their bits per byte" in capsys.readouterr().out
    names = [
        log.name for log in compare._named_apart([compare.read(run) for run in (one, other, one)], [one, other, one])
    ]
    assert names == [str(one), str(other), f"{one} (2)"]


@pytest.mark.parametrize("losses", [[], ["nan"]])
def test_what_is_no_run_or_has_no_step(losses, tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        compare.read(tmp_path)
    with pytest.raises(UserError, match="no step yet"):
        compare.read(run_folder(tmp_path / "run", losses, [1] * len(losses)))


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path, capsys):
    run = run_folder(tmp_path / "run", [5, 4, 3], [1, 2, 3])
    assert cli.main(["compare", str(run), "--out", str(tmp_path / "none" / "x.png")]) == 2
    assert "cannot write" in capsys.readouterr().err
    for name in ("found.json", "picture"):
        assert cli.main(["compare", str(run), "--out", str(tmp_path / name)]) == 2
        assert f"{name}: the picture is a file that ends in .png, .svg or .pdf" in capsys.readouterr().err


def test_a_row_that_is_half_written_is_none(tmp_path):
    run = run_folder(tmp_path / "run", [5, 4, 3], [1, 2, 3])
    with (run / "training_log.csv").open("a") as file:
        file.write("4,256,2.5")
    assert compare.read(run).loss.tolist() == [5, 4, 3]
    assert cli.main(["compare", str(run), "--out", str(tmp_path / "out.png")]) == 0


def test_a_rejected_step_hides_no_row_and_no_validation(tmp_path):
    run = run_folder(tmp_path / "run", [5, 4, "nan"], [1, 2, 3])
    assert history(run)["step"].tolist() == [1, 2, 3]
    read = compare.read(run)
    assert read.loss.tolist() == [5, 4] and read.bits[-1] == 1.5
    (row,) = runs_in(tmp_path)
    assert (row["step"], row["loss"], row["best_bpb"]) == (3, 4, 1.5)


def test_an_upcycled_run_has_only_the_tokens_of_its_own_seconds(tmp_path):
    """Its rows, and so its log, go on where those of the dense run ended."""
    for name, steps in (("one", 1), ("long", 3)):
        run = run_folder(tmp_path / name, [5, 4, 3][:steps], [1, 2, 3][:steps])
        own = compare.read(run).tokens.tolist()
        assert own == [64, 128, 192][:steps]
        log = run / "training_log.csv"
        lines = [line.split(",", 2) for line in log.read_text().splitlines()[1:]]
        moved = [f"{step},{int(tokens) + 6400},{rest}\n" for step, tokens, rest in lines]
        log.write_text("step,tokens,loss,seconds,val_bpb\n" + "".join(moved))
        assert compare.read(run).tokens.tolist() == own
        log.write_text("step,tokens,loss,seconds,val_bpb\n" + "".join(moved[1:]))
        assert steps == 1 or compare.read(run).tokens.tolist() == own[1:]  # a first loss that is no number

"""A run goes on where its text lies elsewhere by now, and one that has only weights begins with any text."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from conftest import build, save, tiny
from khanhllm import optim
from khanhllm.cli import main
from khanhllm.data.sources import anchored
from khanhllm.errors import UserError
from khanhllm.model import losses
from khanhllm.settings import read_config, resolve, write_config
from khanhllm.training import checkpoint
from khanhllm.training.run import train


def config(source, cache, **train):
    data = {"source": str(source), "cache": str(cache), "validation": 0.2, "workers": 1}
    return resolve(tiny().model_dump(), {"data": data, "train": {"steps": 2}}, {"train": train})


@pytest.fixture
def moved(corpus, tmp_path, monkeypatch):
    """A run that was trained on `texts` in one folder, and stands in another now, without its shards."""
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(corpus, old / "texts")
    monkeypatch.chdir(old)
    train(config("texts", "shards"), Path("run"))
    shutil.copytree(corpus, new / "mine")
    (old / "run").rename(new / "run")
    shutil.rmtree(old)
    monkeypatch.chdir(new)
    return new


def test_the_same_text_may_lie_elsewhere(moved, corpus):
    assert main(["train", "--resume", "--run", "run", "--steps", "4", "--data", "mine"]) == 0
    assert read_config(moved / "run").data.source == str(moved / "mine")
    train(config(corpus, "other-shards", steps=4), Path("whole"))
    ends = [load_file(checkpoint.newest(Path(run)) / "model.safetensors") for run in ("run", "whole")]
    assert ends[0].keys() == ends[1].keys()
    assert main(["train", "--resume", "--run", "run", "--steps", "5"]) == 0


def test_other_text_is_refused_in_one_line(moved, capsys):
    before = (moved / "run" / "config.toml").read_bytes()
    with (moved / "mine" / "json-decoder.txt").open("a") as file:
        file.write("Something new.\n" * 100)
    assert main(["train", "--resume", "--run", "run", "--steps", "4", "--data", "mine"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "other shards" in line]
    assert len(said) == 1 and "to train on other text, begin a new run (--run)" in said[0]
    assert (moved / "run" / "config.toml").read_bytes() == before


def test_the_home_of_a_tokenizer_and_of_other_shards_is_known(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    train(config(corpus, tmp_path / "cache"), tmp_path / "run")
    (shards,) = (path.parent for path in (tmp_path / "cache").glob("*/manifest.json"))
    named = {"tokenizer": "~/run/tokenizer.json", "base": f"~/cache/{shards.name}"}
    other = resolve(config(corpus, tmp_path / "cache").model_dump(), {"data": named})
    train(other, tmp_path / "other")
    kept = read_config(tmp_path / "other").data
    assert (kept.tokenizer, kept.base) == (str(tmp_path / "run/tokenizer.json"), str(shards))
    assert main(["evaluate", str(tmp_path / "run"), f"--data={named['base']}"]) == 0
    with_base = resolve(config(corpus, tmp_path / "cache", steps=4).model_dump(), {"data": {"base": str(shards)}})
    with pytest.raises(UserError, match=r"was trained with another data\.base"):
        train(with_base, tmp_path / "run", resume=True)


def test_a_relative_source_is_found_from_another_folder(corpus, tmp_path, monkeypatch):
    shutil.copytree(corpus, tmp_path / "texts")
    monkeypatch.chdir(tmp_path)
    train(config("texts", "shards"), tmp_path / "run")
    shutil.rmtree(tmp_path / "shards")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["train", "--resume", "--run", "../run", "--steps", "4"]) == 0


def test_shards_that_moved_with_their_run_are_scored_and_replayed(corpus, tmp_path, monkeypatch, capsys):
    """As --resume finds them."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    monkeypatch.chdir(old)
    train(config(corpus, "shards"), Path("run"))
    old.rename(new)
    monkeypatch.chdir(new)
    assert main(["evaluate", "run"]) == 0
    assert main(["export", "run", "--to", "hf", "--out", "out", "--remote-code"]) == 0
    assert "on held-out text" in capsys.readouterr().out
    assert main(["train", "--from", "run", "--run", "on", "--train.steps", "1", "--data.replay", "0.5"]) == 0
    assert Path(read_config(new / "on").data.base).parent == new / "shards"


def test_weights_from_elsewhere_begin_with_any_text(moved, corpus, capsys):
    """As an imported model stands in its folder: at step 0, with no data."""
    chosen = resolve(config("c4", "shards").model_dump(), {"data": {"tokenizer": "imported/tokenizer.json"}})
    model = build(chosen, seed=7)
    load_LE = losses.even_load(1, 4).tolist()
    state = {"cursor": 0, "seconds": 0.0, "load": load_LE}
    Path("imported").mkdir()
    save(Path("imported"), 0, model, optim.build(model, chosen.optim, 0), state)
    shutil.copy("run/tokenizer.json", "imported")
    write_config(chosen, Path("imported"))
    arguments = ["train", "--resume", "--run", "imported", "--data.validation", "0.3", "--steps", "1"]
    assert main([*arguments, "--data", "mine", "--data.tokenizer", "run/tokenizer.json"]) == 2
    assert "data.tokenizer" in capsys.readouterr().err
    assert main([*arguments, "--data", "mine", "--optim.lr", "1e-9", "--train.keep", "2"]) == 0
    trained = load_file(checkpoint.newest(Path("imported")) / "model.safetensors")
    first = model.state_dict()
    assert all((trained[name] - first[name]).abs().max() < 1e-6 for name in first)
    assert main(["train", "--resume", "--run", "imported", "--steps", "2", "--data", str(corpus)]) == 0  # the same text
    shutil.copytree("mine", "other")
    (Path("other") / "more.txt").write_text("Something new.\n" * 100)
    assert main(["train", "--resume", "--run", "imported", "--steps", "3", "--data", "other"]) == 2


def test_which_sources_become_absolute(tmp_path, monkeypatch):
    odd = tmp_path / "a[1]"
    (odd / "texts").mkdir(parents=True)
    (odd / "texts" / "b.txt").write_text("b")
    monkeypatch.chdir(odd)
    for same in ("stdlib", "c4", "c4#text", "hf://datasets/a/b", "https://a.b/{0..9}.txt", "/x/y", "/x/*.csv#text"):
        assert anchored(same) == same
    assert anchored("texts") == f"{odd}/texts"
    assert anchored("t.csv#body") == f"{odd}/t.csv#body"
    assert anchored("texts:0.7, c4:3") == f"{odd}/texts:0.7, c4:3"
    assert anchored("https://h/{a,b}.txt:1, texts:3") == f"https://h/{{a,b}}.txt:1, {odd}/texts:3"
    from khanhllm.data.sources import locate

    assert locate(anchored("te*/*.txt")).files == ("b.txt",)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert anchored("~/t.txt") == f"{tmp_path}/t.txt"


def test_a_run_without_data_that_has_begun_is_refused(moved):
    state = {"cursor": 4, "load": losses.even_load(1, 4).tolist()}
    model = build(tiny())
    shutil.rmtree(moved / "run" / "checkpoints")
    save(moved / "run", 1, model, optim.build(model, tiny().optim, 0), state)
    with pytest.raises(UserError, match="other shards"):
        train(config("mine", "shards", steps=4), moved / "run", resume=True)


def test_how_much_of_its_text_a_run_reads_is_not_changed_afterwards(corpus, tmp_path, capsys):
    """Its shards are made by then, so another data.tokens would only stand in its config."""
    train(config(corpus, tmp_path / "shards"), tmp_path / "run")
    kept = (tmp_path / "run" / "config.toml").read_bytes()
    words = ["train", "--resume", "--run", str(tmp_path / "run"), "--steps", "4"]
    assert main([*words, "--data.tokens", "100"]) == 2
    assert "was trained with another data.tokens; change it in a new run (--run)" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.toml").read_bytes() == kept
    assert main(words) == 0

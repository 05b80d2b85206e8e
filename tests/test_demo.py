import pytest

from conftest import tiny
from khanhllm import cli, demo
from khanhllm.errors import UserError
from khanhllm.settings import resolve
from khanhllm.training.run import train


@pytest.mark.slow
def test_the_story_is_told_to_its_end_twice(corpus, tmp_path, capsys):
    """On a few steps of a tiny model; the second time beside the first."""
    size = ["--model.dim", "24", "--model.vocab_size", "400", "--model.context", "32", "--train.steps", "3"]
    data = ["--data.source", str(corpus), "--data.cache", str(tmp_path / "shards"), "--data.workers", "1"]
    for name in ("demo", "demo-2"):
        words = ["demo", "--run", str(tmp_path / "demo"), *size, *data, "--data.validation", "0.2"]
        assert cli.main(words) == 0
        said = capsys.readouterr().out
        for word in ("tokenizer learns", "step 3/3", "gzip -9 needs", "def main(", str(tmp_path / name)):
            assert word in said
        assert (tmp_path / name / "loss.png").stat().st_size > 5000


@pytest.mark.slow
def test_it_learns_to_talk(corpus, tmp_path, capsys, monkeypatch):
    """`--chat` takes the run that is there, tunes it, says how many answers end, and opens no talk on a pipe."""
    own = {"data": {"source": str(corpus), "cache": str(tmp_path / "shards"), "workers": 1}, "train": {"steps": 3}}
    train(resolve(tiny(context=128, pattern="DM").model_dump(), own), tmp_path / "demo.v1")
    (tmp_path / "demo.jsonl").write_text("of the user")
    monkeypatch.setattr(demo, "MADE", 200)
    monkeypatch.setattr(demo, "ASKED", 8)
    assert demo.talk(tmp_path / "demo.v1", {"machine": {"threads": "1"}}) == ""
    told = capsys.readouterr().out
    assert "of 8 answers end" in told and f"khanhllm chat {tmp_path / 'demo.v1-chat'}" in told and "names" in told
    assert (tmp_path / "demo.v1-chat" / "training_log.csv").exists()
    assert (tmp_path / "demo.jsonl").read_text() == "of the user"
    with pytest.raises(UserError, match=r"demo\.v1 is trained already: --train\.steps would change nothing"):
        demo.talk(tmp_path / "demo.v1", {"train": {"steps": "9"}})

import pytest

from khanhllm import cli


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

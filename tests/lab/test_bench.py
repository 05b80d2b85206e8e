"""What is compared is comparable, and the command says what scripts rely on; how fast it is, no test asks."""

import io
import json
from multiprocessing import Pipe

import pytest
from rich.console import Console

from conftest import plain_machine, tiny
from khanhllm import cli
from khanhllm.errors import UserError
from khanhllm.lab import bench
from khanhllm.lab.candidates import Candidate, as_qwen3_moe
from khanhllm.model.counts import active_parameters, flops_per_token, on_paper, total_parameters
from khanhllm.model.twin import dense_twin


@pytest.mark.parametrize(("pattern", "expert_hidden"), [("DM", 48), ("DDM", 44), ("MMMM", 48)])
def test_the_dense_twin_has_the_same_arithmetic(pattern, expert_hidden):
    model = tiny(pattern=pattern, expert_hidden=expert_hidden).model
    ours, twin = on_paper(model), on_paper(dense_twin(model))
    router = 6 * pattern.count("M") * model.experts * model.dim
    assert flops_per_token(twin) == flops_per_token(ours) - router
    assert active_parameters(twin) < active_parameters(ours)
    large = on_paper(dense_twin(model, "total"))
    router = pattern.count("M") * model.experts * model.dim
    assert abs(total_parameters(large) - (total_parameters(ours) - router)) <= 3 * 4 * model.dim * len(pattern)


@pytest.mark.slow
def test_a_step_is_compared_in_turns(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "SMALL", {"model": tiny().model.model_dump(), "train": {"micro_batch": 2}})
    monkeypatch.setattr(bench, "HUGGING_FACE", ["hf eager", "hf nonsense"])
    monkeypatch.setattr(bench, "OURS", ["ours"])
    words = ["step", "--steps", "2", "--json", "--out", str(tmp_path / "bench.json"), "--machine.threads", "1"]
    assert cli.main(["bench", *words, "--machine.device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "bench.json").read_text())
    for ratio in ("ratio_huggingface", "ratio_dense_twin", "share_of_matmul_rate"):
        assert 0 < report[ratio]["least"] <= report[ratio]["median"] <= report[ratio]["most"]
    (step,) = report["step"].values()
    assert step["huggingface_mode"] == "hf eager"
    assert "nonsense" in step["modes"]["hf nonsense"]
    assert step["ours"]["parameters"] == step["hf eager"]["parameters"]  # the same model


OWN = [
    {"style": "classic"},
    {"feedforward": "relu2"},
    {"value_embedding": True},
    {"pair_embedding": 9},
    {"embedding_skip": True},
    {"token_shift": True},
    {"token_norm": True},
    {"stream_scale": True},
]


@pytest.mark.parametrize("own", OWN)
def test_what_hugging_face_has_no_word_for_is_refused(own):
    with pytest.raises(UserError, match=f"model.{next(iter(own))}"):
        as_qwen3_moe(tiny(**own).model, "eager")


@pytest.mark.slow
def test_a_candidate_that_cannot_run_says_why():
    assert "nonsense" in Candidate.enter("hf nonsense", tiny()).fault


def test_a_candidate_that_fails_on_entering_is_not_measured(monkeypatch):
    monkeypatch.setattr(bench, "_fastest", lambda names, *_: (names[0], {}))
    monkeypatch.setattr(
        Candidate, "enter", lambda name, _config: Candidate(name, None, None, fault="no room" if "twin" in name else "")
    )
    with pytest.raises(UserError, match="bench: dense twin cannot run here: no room"):
        bench._compare("x", tiny(), plain_machine(), 2, Console(file=io.StringIO()))


@pytest.mark.parametrize("act", [Candidate.step, Candidate.leave])
def test_a_candidate_whose_process_is_gone_is_one_line(act):
    ours, theirs = Pipe()
    theirs.close()
    with pytest.raises(UserError, match=r"bench: ours: the system ended its process \(too little memory\?\)"):
        act(Candidate("ours", ours, None))


def test_an_unknown_part_is_one_line(capsys):
    assert cli.main(["bench", "everything"]) == 2
    assert "parts: step, moe, decode, tokenizer, data" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_said_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(bench, "PARTS", {"step": None})
    assert cli.main(["bench", "--out", "/dev/null/bench.json", "--machine.device", "cpu"]) == 2
    assert "cannot write /dev/null/bench.json" in capsys.readouterr().err


def test_a_place_that_goes_meanwhile_costs_no_figures(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "PARTS", {"step": lambda *_: {"written": (tmp_path / "gone").write_text("")}})
    words = ["bench", "--json", "--out", str(tmp_path / "gone" / "bench.json"), "--machine.device", "cpu"]
    assert cli.main(words) == 2
    assert json.loads(capsys.readouterr().out)["written"] == 0


def test_a_part_that_fails_costs_no_figures_of_those_before_it(monkeypatch, capsys, tmp_path):
    def missing(*_):
        raise UserError("no such extra")

    monkeypatch.setattr(bench, "PARTS", {"step": lambda *_: {"step": 1}, "data": missing})
    assert cli.main(["bench", "--out", str(tmp_path / "bench.json"), "--machine.device", "cpu"]) == 2
    assert json.loads((tmp_path / "bench.json").read_text())["step"] == 1

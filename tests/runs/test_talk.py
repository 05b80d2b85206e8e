"""A conversation in the terminal."""

import io
import shutil
from dataclasses import replace

import pytest

from khanhllm.cli import main
from khanhllm.errors import UserError
from khanhllm.runs.talk import Talk
from khanhllm.schema import Sampling


@pytest.fixture
def talker(served):
    train = served.config.train.model_copy(update={"targets": "answers"})
    return replace(served, config=served.config.model_copy(update={"train": train}))


@pytest.fixture
def talk(talker, monkeypatch):
    """A function that types lines and returns what the model was asked each time; its answers are numbered."""

    def typing(*lines, answers=iter, **options):
        asked = []

        def stream_chat(_run, messages, stop=(), **sampling):
            asked.append([f"{one['role']}: {one['content']}" for one in messages])
            return answers([f"answer {len(asked)}"])

        monkeypatch.setattr(type(talker), "stream_chat", stream_chat)
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert Talk(talker, Sampling(), **options).run() == 0
        return asked

    return typing


@pytest.fixture
def person(monkeypatch):
    """A function that says whether there is one, at a terminal."""
    return lambda there: monkeypatch.setattr(Talk, "person", property(lambda _: there, lambda *_: None), raising=False)


def test_lines_in_answers_out(talk, capsys):
    asked = talk("one", "", "two")
    assert asked == [["user: one"], ["user: one", "assistant: answer 1", "user: two"]]
    assert capsys.readouterr().out == "answer 1\nanswer 2\n"


def test_commands(talk, capsys):
    asked = talk("one", "zero", "/undo", "two", "/new", "three", "/system Short.", "four", "/help", "/quit", "five")
    first = ["user: one", "assistant: answer 1"]
    assert asked[:3] == [["user: one"], [*first, "user: zero"], [*first, "user: two"]]
    assert asked[3:] == [["user: three"], ["system: Short.", "user: four"]]
    assert "/undo " in capsys.readouterr().err


def test_a_line_that_begins_with_a_slash(talk, person, capsys):
    """For a person it is a command that is mistyped; on a pipe, where nobody reads this, it is a question."""
    person(True)
    assert talk("/usr/bin is what?", "/help") == []
    assert "/usr/bin is unknown; /help lists" in capsys.readouterr().err
    person(False)
    assert talk("/usr/bin is what?", "/help") == [["user: /usr/bin is what?"]]


def test_a_system_message_begins_it(talk):
    assert talk("one", system="Short.") == [["system: Short.", "user: one"]]
    assert talk("one", system="  ") == [["user: one"]]


def test_ctrl_c_ends_the_answer_and_not_the_program(talk, person, capsys):
    def interrupted(pieces):
        yield from pieces
        raise KeyboardInterrupt

    person(True)
    asked = talk("one", "two", answers=interrupted)
    assert asked[1] == ["user: one", "assistant: answer 1", "user: two"]
    assert "answer 1 …" in capsys.readouterr().out


def test_a_question_that_is_too_long_is_told_and_forgotten(talker, person, monkeypatch, capsys):
    """On a pipe an empty line stands in its place, and the exit code tells."""
    monkeypatch.setattr("khanhllm.runs.run.answer", lambda *_: iter(["yes"]))
    lines = "import\n" + "word " * 5000 + "\n\nimport\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert Talk(talker, Sampling(tokens=2)).run() == 2
    out, err = capsys.readouterr()
    assert err.startswith("line 2: the question is longer than the model sees at once") and out == "yes\n\nyes\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    person(True)
    assert Talk(talker, Sampling(tokens=2)).run() == 0
    out, err = capsys.readouterr()
    assert "\nthe question is longer" in err and "line 2" not in err


@pytest.mark.parametrize("letters", ["surrogateescape", "strict"])
def test_a_question_that_is_not_utf8_is_refused(talker, monkeypatch, letters):
    """Also in the locale C, where Python would read its bytes as surrogates."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe bad\n"), "utf-8", letters))
    with pytest.raises(UserError, match="the standard input is not UTF-8 text"):
        Talk(talker, Sampling(tokens=2)).run()


def test_the_oldest_turns_are_forgotten_where_the_context_is_full(talker, monkeypatch):
    seen = []
    monkeypatch.setattr("khanhllm.runs.run.answer", lambda _m, _t, _d, ids, *_: iter(seen.append(ids) or ()))
    turns = [{"role": role, "content": "or"} for _ in range(60) for role in ("user", "assistant")]
    talker.chat([{"role": "system", "content": "S"}, *turns, {"role": "user", "content": "a"}])
    text = talker.tokenizer.decode(seen[0])
    assert len(seen[0]) <= talker.config.model.context // 2 < len(seen[0]) + 8
    assert text.startswith("<|endoftext|><|system|>S<|user|>or") and text.endswith("<|user|>a<|assistant|>")


def test_a_long_system_message_is_never_left_out(talker, monkeypatch):
    """One that took more than half of the context was."""
    seen, context = [], talker.config.model.context
    monkeypatch.setattr("khanhllm.runs.run.answer", lambda _m, _t, _d, ids, *_: iter(seen.append(ids) or ()))
    system = next(text for n in range(9999) if len(talker.tokenizer.encode(text := "or " * n)) > context // 2)
    turns = [{"role": role, "content": "or"} for role in ("user", "assistant", "user")]
    talker.chat([{"role": "system", "content": system}, *turns])
    assert talker.tokenizer.decode(seen[0]) == f"<|endoftext|><|system|>{system}<|user|>or<|assistant|>"
    with pytest.raises(UserError, match="the question, with the system message, is longer than the model sees"):
        talker.chat([{"role": "system", "content": system * 2}, *turns])


def test_a_run_that_was_not_taught_is_refused_in_one_line(served, tmp_path, capsys):
    run = shutil.copytree(served.checkpoint.parents[1], tmp_path / "my run")
    assert main(["chat", str(run)]) == 2
    assert f"was not taught to talk; teach it: khanhllm tune '{run}' --data" in capsys.readouterr().err
    with pytest.raises(UserError, match="not taught"):
        served.chat([{"role": "user", "content": "Hi"}])


def test_a_closed_output_is_told(talk, monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    with pytest.raises(UserError, match="one of them is closed"):
        talk("one")

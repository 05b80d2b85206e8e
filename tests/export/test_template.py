"""A run that talks leaves with its template: transformers makes the ids of a conversation that KhanhLLM makes."""

import json

import pytest
import torch

from conftest import build, save, tiny
from khanhllm.data.chat import Message
from khanhllm.data.render import render
from khanhllm.data.tokenizer import train_tokenizer
from khanhllm.export.exporting import export
from khanhllm.runs.run import open_run
from khanhllm.settings import resolve, write_config

transformers = pytest.importorskip("transformers")

ASKED, SAID = Message("user", "How  many?\n"), Message("assistant", "\n Two, {{ of }} them. ")
TALKS = [
    [ASKED],
    [Message("system", " Be short.\n\n"), ASKED],
    [ASKED, SAID, Message("user", "  And now? 東京\t")],
    [Message("system", "x"), ASKED, SAID, ASKED, SAID],
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["How many rooms has the house? Two of them, and now more.\n" * 3], 290)


def a_run(folder, tokenizer, **train):
    config = resolve(tiny().model_dump(), {"train": train})
    folder.mkdir()
    tokenizer.save(folder / "tokenizer.json")
    write_config(config, folder)
    model = build(config)
    save(folder, 3, model, torch.optim.SGD(model.parameters()), {"cursor": 0, "folder": "", "data": ""})
    return open_run(folder)


def exported(run, out, to="hf", **options):
    return export(run.checkpoint, to, out, compared=False, **options)


@pytest.mark.parametrize("remote_code", [False, True])
def test_transformers_writes_a_conversation_as_we_do(tmp_path, tokenizer, remote_code):
    folder = exported(a_run(tmp_path / "run", tokenizer, targets="answers"), tmp_path / "out", remote_code=remote_code)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for messages in TALKS:
        turns = [{"role": role, "content": text} for role, text in messages]
        asks = messages[-1].role == "user"
        found = theirs.apply_chat_template(turns, add_generation_prompt=asks, tokenize=True, return_dict=True)
        assert list(found["input_ids"]) == render(messages, tokenizer, answer=asks)
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [tokenizer.specials["<|end|>"], tokenizer.end_of_text]
    assert "tuned on conversations" in (folder / "README.md").read_text()


def test_a_run_that_was_not_tuned_has_no_template(tmp_path, tokenizer):
    folder = exported(a_run(tmp_path / "run", tokenizer), tmp_path / "out")
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == tokenizer.end_of_text


def test_gguf_has_the_template_too(tmp_path, tokenizer):
    gguf = pytest.importorskip("gguf")
    for name, train in (("base", {}), ("chat", {"targets": "answers"})):
        run = a_run(tmp_path / name, tokenizer, **train)
        fields = gguf.GGUFReader(
            exported(run, tmp_path / f"{name}.gguf", to="gguf") or tmp_path / f"{name}.gguf"
        ).fields
        assert ("tokenizer.chat_template" in fields) == (name == "chat")
    assert fields["tokenizer.ggml.eot_token_id"].contents() == tokenizer.specials["<|end|>"]
    assert fields["tokenizer.chat_template"].contents().startswith("{{ '<|endoftext|>' }}")

"""Any configuration is one of two things: refused in one line that names the key, or able to run.

Keys and kinds of value come from `Config` itself, so a new knob is tried without a word here. What is accepted is
trained for a step on a tiny corpus, its sizes cut down first. 200 draws are the quick form; KHANHLLM_FUZZ=2000 the long
one, from the same seed.
"""

import math
import os
import random
import re
from collections import Counter
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest

from conftest import exit_code, tiny
from khanhllm.data.ensure import ensure
from khanhllm.errors import UserError
from khanhllm.machine import devices
from khanhllm.schema import Config
from khanhllm.settings import read_toml, resolve, to_toml
from khanhllm.training import run as training_run
from khanhllm.training.run import train

pytestmark = pytest.mark.slow

DRAWS = int(os.environ.get("KHANHLLM_FUZZ", "200"))
KEYS = [(section, key) for section, values in Config() for key, _ in values]
NASTY: list[Any] = [
    math.nan, math.inf, -math.inf, -1, 0, 1, 2**31, 2**53, 2**63, 2**64, 10**400, -(10**400), 10**5000, 1e308, 1e-320,
    -0.0, 0.5, 1.0, True, False, None, "", " ", "nan", "inf", "-1", "0x10", "1e3", "1_000", "auto", "on", "off", "ja",
    "٣", "模型", "🦙", "\0", "a\0b", "\n", "\33[2J", "\ud800", "a" * 300, "a" * 10_000, "..", "*", "**/*", "[",
    "{1..9}", "{0..999999999999}", "a:nan,b:1", "file:///etc/passwd", "#", "%s%n", [], [1], {}, {"a": 1}, {"dim": 8},
    [[[[]]]], b"bytes", "cuda:99999999999999999999", "cuda:7", "~nobody-here", "~nobody-here:1,b:1",
    "a" * 300 + ":1,b:1",
]  # fmt: skip
BOUNDS = ("ge", "gt", "le", "lt")
SMALL = {
    "model.dim": 64, "model.heads": 4, "model.hidden": 64, "model.expert_hidden": 64, "model.experts": 8,
    "model.context": 64, "model.vocab_size": 400, "model.pair_embedding": 500, "train.steps": 1,
    "train.seconds": 1, "train.micro_batch": 3, "train.accumulation": 2,
    "train.sample_tokens": 8, "train.eval_tokens": 500, "machine.threads": 1, "machine.processes": 0,
    "data.workers": 1,
}  # fmt: skip
"""as large as the runs of a test may be"""


def good(chance: random.Random, section: str, key: str) -> Any:
    """A value that the field's own type and bounds allow."""
    field = Config.model_fields[section].annotation.model_fields[key]
    if f"{section}.{key}" == "model.pattern":
        return "".join(chance.choices("DM", k=chance.randint(1, 4)))
    kind, limits = field.annotation, field.metadata
    if get_origin(kind) is Union:
        kind = chance.choice(get_args(kind))
    if get_origin(kind) is Annotated:
        kind, limits = kind.__origin__, kind.__metadata__[0].metadata
    if get_origin(kind) is Literal:
        return chance.choice(get_args(kind))
    bounds = {name: getattr(bound, name) for bound in limits for name in BOUNDS if hasattr(bound, name)}
    low, high = bounds.get("ge", bounds.get("gt", 0)), bounds.get("le", bounds.get("lt", 10))
    if kind is int:
        return chance.choice([low, min(high, low + chance.randint(0, 200)), high, chance.randint(low, high)])
    if kind is float:
        return chance.choice([low, high, chance.uniform(low, high), low + 1e-9])
    return chance.choice([True, False]) if kind is bool else ""


def drawn(chance: random.Random) -> tuple[dict[str, Any], set[str]]:
    """Settings with one to five keys drawn anew, and the sections that they are in."""
    settings: dict[str, Any] = {}
    sections = set()
    for _ in range(chance.randint(1, 5)):
        section, key = chance.choice(KEYS)
        value = good(chance, section, key) if chance.random() < 0.85 else chance.choice(NASTY)
        if chance.random() < 0.04:
            key = chance.choice(["", "dmi", key + " ", key.upper(), "__class__", "\0", "a" * 5000, "ключ"])
        sections.add(section)
        if chance.random() < 0.02:
            settings[section] = value
        elif isinstance(settings.setdefault(section, {}), dict):
            settings[section][key] = typed(value) if chance.random() < 0.3 else value
    if chance.random() < 0.02:
        odd = chance.choice(["", "trian", "Model", "\33[2J", "a" * 5000])
        settings[odd] = chance.choice(NASTY)
        sections.add(odd)
    return settings, sections


def typed(value: Any) -> Any:
    """As a command line gives it."""
    try:
        return str(value)
    except ValueError:  # too many digits to be typed
        return value


def cut_down(config: Config, room: dict[str, Any]) -> Config:
    """The same, small enough for a test, and on text that is here if it names none of its own."""
    sizes: dict[str, Any] = {}
    for dotted, most in SMALL.items():
        section, key = dotted.split(".")
        value = getattr(getattr(config, section), key)
        if value != "auto" and (value > most or key in ("threads", "workers")):
            sizes.setdefault(section, {})[key] = most
    if len(config.model.pattern) > 4:
        sizes.setdefault("model", {})["pattern"] = config.model.pattern[:4]
    return resolve(config.model_dump(), sizes, room, {"machine": {"compile": "off"}})


def fuzz(count: int, seed: int, corpus: Any, folder: Any) -> Counter[str]:
    """What became of so many configurations. Raises whatever is neither a run nor a refusal in one line."""
    chance = random.Random(seed)
    found: Counter[str] = Counter()
    for nth in range(count):
        settings, sections = drawn(chance)
        here = {"source": str(corpus), "cache": str(folder / "shards"), "validation": 0.2}
        try:
            config = resolve(tiny().model_dump(), {"data": here}, settings, where="fuzz")
        except UserError as error:
            line = str(error)
            assert line.isprintable() and len(line) < 1000, (settings, line)
            assert any(name[:60] in line or ascii(name)[1:-1] in line for name in sections), (settings, line)
            found["refused"] += 1
            continue
        except Exception as error:
            raise AssertionError(f"draw {nth} of seed {seed}: {settings!r:.2000}") from error
        try:
            assert resolve(toml(config, folder)) == config
            train(cut_down(config, {"data": {"cache": here["cache"]}}), folder / f"run-{nth}")
            found["ran"] += 1
        except UserError as error:
            assert str(error).isprintable(), (settings, str(error))
            found["accepted, then refused by name: " + str(error).replace(str(folder), "")[:70]] += 1
        except Exception as error:
            raise AssertionError(f"draw {nth} of seed {seed}: {settings!r:.2000}") from error
    return found


def toml(config: Config, folder: Any) -> dict[str, Any]:
    """The config once through a file."""
    (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
    return read_toml(folder / "config.toml")


def test_good_values_are_of_every_kind_that_a_key_takes():
    chance = random.Random(0)
    for key, wanted in (("model.value_embedding", {True, False, "normed"}), ("train.micro_batch", {"auto", 1, 2**20})):
        values = {good(chance, *key.split(".")) for _ in range(100)}
        assert values >= wanted
        assert all(resolve({section: {name: value}}) for section, name in [key.split(".")] for value in values)


def test_each_nasty_value_of_each_key_is_refused_in_one_line_or_survives_its_file(tmp_path):
    for section, key in KEYS:
        for value in NASTY:
            try:
                config = resolve({section: {key: value}}, where="fuzz")
                assert resolve(toml(config, tmp_path)) == config, (section, key, value)
            except UserError as error:
                line = str(error)
                assert line.startswith((f"fuzz: {section}.{key}: ", f"fuzz: {section}: ")), (section, key, line)
                assert line.isprintable() and len(line) < 600, line


@pytest.mark.parametrize("name", NASTY, ids=lambda name: ascii(name)[:40] if isinstance(name, str) else "other")
@pytest.mark.parametrize("key", ["source", "tokenizer", "cache"])
def test_names_of_files_are_met_in_one_line(corpus, tmp_path, monkeypatch, capfd, key, name):
    monkeypatch.chdir(tmp_path)
    here = {"source": str(corpus), "cache": str(tmp_path / "shards"), "validation": 0.2, "workers": 1}
    try:
        config = resolve(tiny().model_dump(), {"data": here}, {"data": {key: name}})
        ensure(config.data, 300, 1000)
    except UserError as error:
        assert str(error).isprintable()


def test_any_configuration_runs_or_is_refused_in_one_line(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "matmul_rate", lambda *_: 1e9)
    monkeypatch.chdir(tmp_path)
    found = fuzz(DRAWS, 0, corpus, tmp_path)
    print(*(f"{number:5} {what}" for what, number in found.most_common()), sep="\n")
    assert found["ran"] > DRAWS // 5 and found["refused"] > DRAWS // 5


# name: (the bytes of a TOML file, what the one line says; empty: it is read)
FILES = {
    "ten megabytes": (b"# a comment\n" * 900_000, "it has 10,800,000 bytes"),
    "a key of 200,000 letters": (b"a" * 200_000 + b" = 1", "unknown key a{60}[^a]"),
    "brackets": (b"a = " + b"[" * 200_000, "is not valid TOML"),
    "braces": (b"a = " + b"{a=" * 50_000, "is not valid TOML"),
    "dots": (b"a" + b".a" * 120_000 + b" = 1", "nested too deep"),
    "dotted keys": (b"[model]\n" + b"".join(b"a%d.b.c.d = 1\n" % n for n in range(15_000)), "unknown key model.a0"),
    "not UTF-8": (b"[train]\nsteps = 5 # caf\xe9", "is not valid TOML"),
    "UTF-16": ("[train]\nsteps = 5".encode("utf-16"), "is not valid TOML"),
    "a key twice": (b"[train]\nsteps = 5\nsteps = 6", "is not valid TOML"),
    "a table twice": (b"[train]\nsteps = 5\n[train]\nkeep = 1", "is not valid TOML"),
    "an array of tables": (b"[[train]]\nsteps = 5", "train: "),
    "a date": (b"[train]\nsteps = 2020-01-01", "train.steps: "),
    "an integer of 10,000 digits": (b"[train]\nsteps = " + b"9" * 10_000, "is not valid TOML"),
    "a hexadecimal one": (b"[train]\nsteps = 0x" + b"f" * 10_000, "train.steps: .*thousands of digits"),
    "NaN": (b"[optim]\nlr = nan", "optim.lr: "),
    "NUL bytes": (b"[train]\nsteps = 5\0", "is not valid TOML"),
    "half a character": (b'[train]\nsample_prompt = "\\ud800"', "is not valid TOML"),
    "cut": (b"[train]\nsteps =", "is not valid TOML"),
    "no section": (b"steps = 5", "unknown key steps"),
    "empty": (b"", ""),
    "a byte order mark": (b"\xef\xbb\xbf[train]\nsteps = 5", ""),
    "carriage returns": (b"[train]\r\nsteps = 5\r\n", ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_a_config_file_is_read_or_refused_in_one_line(tmp_path, capfd, monkeypatch, kind):
    data, said = FILES[kind]
    (tmp_path / "a.toml").write_bytes(data)
    monkeypatch.setattr(training_run, "train", lambda config, *_, **__: print(config.train.steps))
    code, out, error = typed_in(capfd, "train", "--config", str(tmp_path / "a.toml"))
    if said:
        assert code == 2 and not out and re.search(said, error) and error.count("\n") == 1 and len(error) < 600, error
    else:
        assert (code, error) == (0, "")
        assert out == ("5\n" if data else "1000\n")


# command lines, and what the one line says
WORDS = {
    "--train.steps=": "train.steps",
    "--train.steps": "needs a value",
    "--train.steps --resume": "needs a value",
    "--twin": "--twin needs a value: active or total",
    "--train.steps=-1": "train.steps",
    "--train.steps -1": "needs a value|train.steps",
    "--train.steps=10.5": "train.steps",
    "--train.steps=0x10": "train.steps",
    "--train.steps=\udcff": "train.steps",
    "--train.steps=" + "9" * 10_000: "train.steps",
    "--train.step=5": r"unknown option --train.step \(did you mean --train.steps\?\)",
    "--train.=5": "unknown option",
    "--train=5": "unknown option",
    "--.steps=5": "unknown option",
    "--model.dim=8.0.0": "model.dim",
    "--optim.lr=nan": "optim.lr",
    "--optim.lr=": "optim.lr",
    "--optim.lr=1e999": "optim.lr",
    "--optim.name=sgd": "optim.name",
    "--log.tensorboard=perhaps": "log.tensorboard",
    "--train.sample_prompt=\udcff": "train.sample_prompt",
    "--train.sample_prompt=" + "a" * 5000: "train.sample_prompt",
    "--machine.device=cuda:-1": "machine.device",
    "--data.source=a\0b": "data.source",
    "--config": "needs a value",
    "--config=": "the name is empty",
    "--config=/dev/zero": "it is not a regular file",
    "--config=" + "a" * 300: "cannot read the config",
    "--\33[2J": "unknown option",
    "mini": "one word too many",
}  # fmt: skip


@pytest.mark.parametrize("words", WORDS, ids=lambda words: ascii(words[:40]))
def test_a_wrong_command_line_is_refused_in_one_line(tmp_path, capfd, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    code, _, error = typed_in(capfd, "train", "nano", "--run", "run", *words.split(" "))
    assert code == 2 and re.search(WORDS[words], error), error
    assert error.count("\n") == 1 and error[:-1].isprintable() and len(error) < 600, error
    assert not list(tmp_path.glob("run/*"))


def typed_in(capfd, *words):
    code = exit_code(list(words))
    return code, *capfd.readouterr()

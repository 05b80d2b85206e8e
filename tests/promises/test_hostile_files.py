"""A run folder that somebody sent: nothing in it can run code, write outside it, fill the memory or hang.

Each kind of attack is one line in a table. It is met by the command line, and what it must answer is one line and exit
code 2; or, where an older checkpoint is whole, the reason and that one. After each, all that lies around the run folder
is what it was, and the peak of memory has hardly risen. The attacker knows the format: manifests are made to agree.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import socket
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import build, save, tiny
from khanhllm import cli, optim
from khanhllm.errors import UserError
from khanhllm.machine import devices
from khanhllm.schema import OptimConfig
from khanhllm.settings import resolve
from khanhllm.training import checkpoint, tensor_files
from khanhllm.training.run import train

pytestmark = pytest.mark.slow

TB = 2**40
MOST_MEMORY = 200e6
PATIENCE = 20


@pytest.fixture(scope="module")
def world(tmp_path_factory, corpus):
    """A folder with an honest run of two checkpoints, its shards, and something that must not be touched."""
    world = tmp_path_factory.mktemp("world")
    (world / "precious").mkdir()
    (world / "precious" / "letter.txt").write_text("do not touch")
    data = {"source": str(corpus), "cache": str(world / "shards"), "validation": 0.2, "workers": 1}
    length = {"steps": 4, "save_every": 2, "eval_every": 0, "eval_tokens": 64, "sample_tokens": 2}
    train(resolve(tiny().model_dump(), {"data": data, "train": length}), world / "run")
    return world


@pytest.fixture
def run(world, tmp_path, monkeypatch):
    """A copy of the world to spoil: its run folder."""
    monkeypatch.setattr(devices, "matmul_rate", lambda *_: 1e9)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world, tmp_path / "world")
    run = tmp_path / "world" / "run"
    for path in (run / "config.toml", *run.glob("checkpoints/*/state.json")):
        path.write_text(path.read_text().replace(str(world), str(run.parent)))
    for path in run.glob("checkpoints/*"):
        reseal(path)
    return run


# ---- what an attacker does to a file ----


class Bomb:
    def __reduce__(self):
        return os.system, ("touch canary; touch ../canary",)


PICKLE = pickle.dumps(Bomb())
DEEP = b"[" * 100_000
HUGE = b"9" * 10_000


def reseal(step):
    names = [path.name for path in sorted(step.iterdir()) if path.name != "manifest.json" and path.is_file()]
    sealed = {name: tensor_files.fingerprint(step / name) for name in names}
    (step / "manifest.json").write_text(json.dumps(sealed))


def becomes(data):
    """The file is these bytes."""
    return lambda path: path.write_bytes(data)


def sparse(size):
    """A file of so many bytes that holds none."""

    def spoil(path):
        path.unlink(missing_ok=True)
        with path.open("wb") as file:
            try:
                file.truncate(size)
            except OSError:
                pytest.skip("this file system has no files of that size")

    return spoil


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def plug(path):
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as end:
        os.chdir(path.parent)  # the name of a socket must be short
        end.bind(path.name)


def folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()


def link(target):
    """A link to what lies outside."""

    def spoil(path):
        world = next(parent for parent in path.parents if parent.name == "world")
        outside = world / target
        if outside.parent.name == "moved":
            outside.parent.mkdir(exist_ok=True)
            path.replace(outside)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        path.symlink_to(outside)

    return spoil


def says(**changes):
    """A JSON file with other values."""
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_text(old, new):
    def spoil(path):
        assert re.search(old, path.read_text())
        path.write_text(re.sub(old, lambda _: new, path.read_text(), count=1))

    return spoil


def head(header, data=b"", length=None):
    """A safetensors file with this header."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return becomes((struct.pack("<Q", len(header)) if length is None else length) + header + data)


def entry(shape, begin=0, end=8, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def tensors(change):
    def spoil(path):
        kept = load_file(path)
        change(kept)
        save_file(kept, path)

    return spoil


def first(change):
    """The first tensor is another."""

    def on(kept):
        name = min(kept)
        kept[name] = change(kept[name])

    return tensors(on)


def every(change):
    return tensors(lambda kept: kept.update({name: change(tensor) for name, tensor in kept.items()}))


def sparse_tensor(path):
    """A terabyte that its header explains."""
    header = json.dumps({"x": entry([TB // 4], 0, TB)}).encode()
    sparse(TB + 8 + len(header))(path)
    with path.open("r+b") as file:
        file.write(struct.pack("<Q", len(header)) + header)


# ---- checkpoints: what becomes of a file, and what is said; the manifest is made to agree ----

WEIGHTS = {
    "a pickle": (becomes(PICKLE), "no safetensors file"),
    "a zipped pickle": (becomes(b"PK\x03\x04" + PICKLE), "no safetensors file"),
    "empty": (becomes(b""), "no safetensors file"),
    "header of 2^63 bytes": (head({}, length=struct.pack("<Q", 2**63)), "claims a header of 9,223"),
    "header of NaN bytes": (head({}, length=struct.pack("<d", float("nan"))), "claims a header"),
    "header of 100 MB, claimed": (head({}, length=struct.pack("<Q", 100_000_000)), "claims a header of 100,000,000"),
    "header of 17 MB of blanks": (head(b" " * 17 * 2**20), "claims a header of 17,825,792|more than there is to keep"),
    "header longer than the file": (head({}, length=struct.pack("<Q", 1000)), "no safetensors file"),
    "header not UTF-8": (head(b'{"\xff": 1}'), "no safetensors file"),
    "header of brackets": (head(b'{"x":' + DEEP), "no safetensors file"),
    "header a list": (head(b"[]"), "no safetensors file"),
    "overlapping offsets": (head({"x": entry([2]), "y": entry([2], 4, 12)}, bytes(12)), "no safetensors file"),
    "a hole": (head({"x": entry([2]), "y": entry([2], 16, 24)}, bytes(24)), "no safetensors file"),
    "bytes behind": (head({"x": entry([2])}, bytes(99)), "no safetensors file"),
    "negative shape": (head({"x": entry([-2])}, bytes(8)), "no safetensors file"),
    "shape of 2^60": (head({"x": entry([2**60])}, bytes(8)), "no safetensors file"),
    "shape whose product overflows": (head({"x": entry([2**40, 2**40])}, bytes(8)), "no safetensors file"),
    "offsets backwards": (head({"x": entry([2], 8, 0)}, bytes(8)), "no safetensors file"),
    "offsets of 2^64": (head({"x": entry([2], 0, 2**64)}, bytes(8)), "no safetensors file"),
    "a key twice": (
        head(b'{"x":%s,"x":%s}' % ((json.dumps(entry([2])).encode(),) * 2), bytes(8)),
        "is None in the checkpoint",
    ),
    "objects for numbers": (head({"x": entry([1], dtype="O")}, bytes(8)), "no safetensors file"),
    "a terabyte of nothing": (sparse_tensor, "bytes, more than there is to keep"),
}
MODEL = {
    "whole numbers": (every(lambda tensor: tensor.to(torch.int32)), "numbers of type I32"),
    "fp64": (every(torch.Tensor.double), "numbers of type F64"),
    "another shape": (first(lambda tensor: torch.zeros(3, 3)), r"is \(3, 3\) in the checkpoint"),
    "a tensor less": (tensors(lambda kept: kept.pop("head.weight")), "head.weight is None in the checkpoint"),
    "a tensor more": (tensors(lambda kept: kept.update(more=torch.zeros(1))), "more .*but None in this model"),
    "a name of a megabyte": (tensors(lambda kept: kept.update({"a" * 2**20: torch.zeros(1)})), "a{100} is"),
    "a name that steers terminals": (tensors(lambda kept: kept.update({"\33[2J": torch.zeros(1)})), r"x1b\[2J is"),
}  # fmt: skip
STATE = {
    "a pickle": (becomes(PICKLE), "not the state of a run"),
    "empty": (becomes(b""), "not the state of a run"),
    "no object": (becomes(b"[1]"), "not the state of a run"),
    "brackets": (becomes(DEEP), "not the state of a run"),
    "deep inside": (with_text(r'"data"', '"x": ' + "[" * 100_000 + "]" * 100_000 + ', "data"'), "not the state of"),
    "not UTF-8": (becomes(b'{"step": "\xff"}'), "not the state of a run"),
    "a terabyte of nothing": (sparse(TB), "has 1,099,511,627,776 bytes, more than"),
    "step a text": (says(step="4"), r"\(step: "),
    "step negative": (says(step=-1), r"\(step: "),
    "step 2^70": (says(step=2**70), r"\(step: "),
    "step of 10,000 digits": (with_text(r'"step": \d+', '"step": ' + HUGE.decode()), "not the state of a run"),
    "step a half": (says(step=3.5), r"\(step: "),
    "step true": (says(step=True), r"\(step: "),
    "step NaN": (says(step=float("nan")), r"\(step: "),
    "step of another": (says(step=3), "is of another step, 3"),
    "cursor a list": (says(cursor=[1]), r"\(cursor: "),
    "cursor negative": (says(cursor=-5), r"\(cursor: "),
    "cursor 2^70": (says(cursor=2**70), r"\(cursor: "),
    "load NaN": (says(load=[[float("nan")] * 4]), r"\(load\.0\.0: "),
    "load of texts": (says(load=[["a"] * 4]), r"\(load\.0\.0: "),
    "load a number": (says(load=7), r"\(load: "),
    "data a number": (says(data=7), r"\(data: "),
    "folder a number": (says(folder=7), r"\(folder: "),
    "folder with a NUL": (says(folder="a\0b"), r"\(folder: "),
    "folder of a megabyte": (says(folder="a" * 2**20), r"\(folder: "),
    "optimizer a list": (says(optimizer=[]), r"\(optimizer: "),
    "optimizer without a class": (says(optimizer={"state": {}}), r"\(optimizer\.class: "),
    "moments of texts": (says(optimizer={"class": "AdamW", "state": {"a": {"b": "c"}}}), r"\(optimizer\.state\.a\.b"),
    "format of tomorrow": (says(format=99), "format 99, this version reads 2"),
    "a folder": (folder, "state.json"),
}  # fmt: skip
MANIFEST = {
    "a pickle": (becomes(PICKLE), "not a manifest"),
    "empty": (becomes(b""), "not a manifest"),
    "a list": (becomes(b"[]"), "lacks"),
    "a number": (becomes(b"7"), "not a manifest"),
    "brackets": (becomes(DEEP), "not a manifest"),
    "a huge integer": (with_text(r"\d+", HUGE.decode()), "not a manifest"),
    "NaN bytes": (with_text(r"\d+", "NaN"), "instead of nan"),
    "bytes a list": (with_text(r'"bytes": \d+', '"bytes": []'), r"instead of \[\]"),
    "upwards": (says(**{"../../../../precious/letter.txt": {"bytes": 12, "sha256": ""}}), "a file elsewhere"),
    "absolute": (says(**{"/etc/passwd": {"bytes": 1, "sha256": ""}}), "a file elsewhere"),
    "the folder above": (says(**{"..": {"bytes": 4096, "sha256": ""}}), "a file elsewhere"),
    "a name with a NUL": (says(**{"a\0b": {"bytes": 1, "sha256": ""}}), "not a manifest"),
    "entries of text": (says(**{"state.json": "all is well"}), "not a manifest"),
    "a terabyte of nothing": (sparse(TB), "it has 1,099,511,627,776 bytes, more than"),
}  # fmt: skip
FOREIGN = {
    "state, a pipe": ("state.json", pipe, "state.json is not a regular file"),
    "state, a plug": ("state.json", plug, "state.json is not a regular file"),
    "state, a link": ("state.json", link("moved/state.json"), "state.json is a link"),
    "state, a link to a device": ("state.json", link("/dev/zero"), "state.json is a link"),
    "manifest, a pipe": ("manifest.json", pipe, "manifest.json is not a regular file"),
    "manifest, a link": ("manifest.json", link("moved/manifest.json"), "manifest.json is a link"),
    "weights, a link": ("model.safetensors", link("moved/model.safetensors"), "model.safetensors is a link"),
    "all, a link": ("", link("moved/step"), "is a link"),
    "a stray link": ("", lambda path: (path / "notes.txt").symlink_to("/etc"), "notes.txt is a link"),
    "a stray pipe": ("", lambda path: os.mkfifo(path / "pytorch_model.bin"), "not a regular file"),
}
CHECKPOINTS = {
    f"{name}: {kind}": (name, *what)
    for name, table in {
        "model.safetensors": WEIGHTS | MODEL,
        "optimizer.safetensors": WEIGHTS,
        "state.json": STATE,
        "manifest.json": MANIFEST,
    }.items()
    for kind, what in table.items()
    if (name, kind) != ("optimizer.safetensors", "a key twice")  # harmless until it is asked for
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_hostile_checkpoint_is_passed_over_or_refused(run, capfd, kind):
    name, spoil, said = CHECKPOINTS[kind]
    newest = run / "checkpoints" / "step-0000004"
    spoil(newest / name)
    if name != "manifest.json" and (newest / name).is_file():
        size = (newest / name).stat().st_size
        if size < TB:
            reseal(newest)
        else:  # its sha256 would take the attacker an hour
            says(**{name: {"bytes": size, "sha256": "0"}})(newest / "manifest.json")
    code, error = met(run, capfd, "generate", run, "--tokens", "2")
    assert code == 0
    assert re.fullmatch(rf"checkpoint step-0000004 rejected: .*({said}).*\n", error), error
    shutil.rmtree(run / "checkpoints" / "step-0000002")
    refused(run, capfd, "start again in another folder", "generate", run, "--tokens", "2")


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_checkpoint_that_lies_elsewhere_is_refused(run, capfd, kind):
    name, spoil, said = FOREIGN[kind]
    spoil(run / "checkpoints" / "step-0000004" / name)
    refused(run, capfd, said, "generate", run, "--tokens", "2")
    heard = []
    assert checkpoint.newest(run, heard.append) == run / "checkpoints" / "step-0000002"
    assert re.search(said, heard[0])


# ---- the files of a run: which one, what becomes of it, and what is said ----

SHAPES = {
    "dim of another": (r"\ndim = \d+", "\ndim = 64", "check model"),
    "layers of another": (r'pattern = "DM"', 'pattern = "DMDM"', "check model"),
    "256 layers of 65,536 features": (
        r'pattern = "DM"(?s:.*)\nhidden = \d+',
        'pattern = "' + "M" * 256 + '"\ndim = 65536\nheads = 4\nhidden = 1048576',
        "check model",
    ),
    "a vocabulary of 2^24": (r"vocab_size = 300", "vocab_size = 16777216", "check model"),
    "dim of 10,000 digits": (r"\ndim = \d+", f"\ndim = {HUGE.decode()}", "is not valid TOML"),
    "dim of hexadecimal 10,000 digits": (r"\ndim = \d+", f"\ndim = 0x{HUGE.decode()}", "model.dim"),
    "dim NaN": (r"\ndim = \d+", "\ndim = nan", "model.dim"),
    "a key that steers terminals": (r"\ndim = ", '\n"\\u001b[2J" = 1\ndim = ', r"unknown key model.\\x1b\[2J"),
    "a key of 100,000 letters": (r"\ndim = ", f"\n{'a' * 100_000} = 1\ndim = ", "unknown key model.a{60}[;(]"),
}
CONFIG = {
    "a pickle": (becomes(PICKLE), "is not valid TOML"),
    "brackets": (becomes(b"a = " + DEEP), "is not valid TOML|nested too deep"),
    "deep tables": (becomes(b"a" + b".a" * 100_000 + b" = 1"), "is not valid TOML|nested too deep|unknown key"),
    "ten megabytes": (becomes(b"# \n" * 3_500_000), "it has 10,500,000 bytes, more than 262,144"),
    "a terabyte of nothing": (sparse(TB), "it has 1,099,511,627,776 bytes"),
    "not UTF-8": (becomes(b"a = '\xff'"), "is not valid TOML"),
    "a pipe": (pipe, "it is not a regular file"),
    "a folder": (folder, "Is a directory"),
    "a link": (link("moved/config.toml"), "config.toml is a link"),
} | {kind: (with_text(old, new), said) for kind, (old, new, said) in SHAPES.items()}


def vocabulary(change):
    def spoil(path):
        layout = json.loads(path.read_text())
        vocab = layout["model"]["vocab"]
        change(layout, vocab, sorted(vocab, key=vocab.get))
        path.write_text(json.dumps(layout))

    return spoil


NOT_OURS = "is not a byte-level BPE"
TOKENIZER = {
    "a pickle": (becomes(PICKLE), "not UTF-8|not a byte-level"),
    "brackets": (becomes(DEEP), NOT_OURS),
    "a huge integer": (becomes(HUGE), NOT_OURS),
    "a terabyte of nothing": (sparse(TB), "it has 1,099,511,627,776 bytes"),
    "an id beyond": (vocabulary(lambda _, vocab, by_id: vocab.update({by_id[-1]: 2**60})), NOT_OURS),
    "an id below": (vocabulary(lambda _, vocab, by_id: vocab.update({by_id[-1]: -1})), NOT_OURS),
    "an id twice": (vocabulary(lambda _, vocab, by_id: vocab.update({by_id[-1]: 280})), NOT_OURS),
    "ids of floats": (vocabulary(lambda _, vocab, by_id: vocab.update({by_id[9]: 9.0})), NOT_OURS),
    "an id of text": (vocabulary(lambda _, vocab, by_id: vocab.update({by_id[9]: "9"})), NOT_OURS),
    "an id NaN": (vocabulary(lambda _, vocab, by_id: vocab.update({by_id[9]: float("nan")})), NOT_OURS),
    "an endless special": (vocabulary(lambda layout, *_: layout["added_tokens"][0].update(id=float("inf"))), NOT_OURS),
    "half a character": (vocabulary(lambda layout, *_: layout["added_tokens"][1].update(content="\ud800")), NOT_OURS),
    "half a character elsewhere": (vocabulary(lambda layout, *_: layout.update(note="\ud800")), NOT_OURS),
    "a byte missing": (vocabulary(lambda _, vocab, by_id: vocab.update({"ab": vocab.pop("a")})), NOT_OURS),
    "merges of numbers": (vocabulary(lambda layout, *_: layout["model"].update(merges=[[1, 2]])), NOT_OURS),
    "a pattern of its own": (
        vocabulary(lambda layout, *_: layout.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}})),
        NOT_OURS,
    ),
    "more tokens than the model": (
        vocabulary(lambda layout, *_: layout["added_tokens"].append({"id": 300, "content": "<|more|>"})),
        "has 301 tokens, more than this model knows",
    ),
    "a pipe": (pipe, "is not a regular file"),
    "a link": (link("moved/tokenizer.json"), "tokenizer.json is a link"),
}
OTHERS = {
    name: {
        "a link": (link("precious/letter.txt"), f"{name} is a link"),
        "a pipe": (pipe, f"{name} is not a regular file"),
    }
    for name in (
        "samples.txt", "training_log.csv", "experts.csv", ".lock", "config.tmp", "training_log.tmp", "vocab.txt",
        "tensorboard",
    )
} | {
    "checkpoints": {
        "a link to a file": (link("precious/letter.txt"), "checkpoints is a link"),
        "a link to nothing": (link("precious/nothing"), "checkpoints is a link"),
        "a link to a folder with links": (
            lambda path: (link("moved/checkpoints")(path), (path / "stray").symlink_to("/etc")), "stray is a link"
        ),
    },
    "training_log.csv": {
        "a link": (link("precious/letter.txt"), "training_log.csv is a link"),
        "a terabyte of nothing": (sparse(TB), "it has 1,099,511,627,776 bytes"),
        "other columns": (becomes(b"a,b\n1,2\n"), "has other columns"),
    },
    "checkpoints/step-0000005": {"a link": (link("precious"), "step-0000005 is a link")},
    "checkpoints/step-0000005.tmp": {"a link": (link("precious"), "step-0000005.tmp is a link")},
}  # fmt: skip
READING = {"config.toml": CONFIG, "tokenizer.json": TOKENIZER}


def cases(table):
    return {f"{name}: {kind}": (name, *what) for name, kinds in table.items() for kind, what in kinds.items()}


@pytest.mark.parametrize("kind", cases(READING))
def test_a_hostile_file_of_a_run_is_refused(run, capfd, kind):
    name, spoil, said = cases(READING)[kind]
    spoil(run / name)
    refused(run, capfd, said, "generate", run, "--tokens", "2")


@pytest.mark.parametrize("kind", cases({"config.toml": CONFIG} | OTHERS))
def test_a_training_writes_nowhere_else(run, capfd, kind):
    name, spoil, said = cases({"config.toml": CONFIG} | OTHERS)[kind]
    spoil(run / name)
    refused(run, capfd, said, "train", "--resume", "--run", run, "--steps", "5")


# ---- what only a training or an evaluation reads ----


def moments(change):
    def spoil(run):
        for step in (run / "checkpoints").iterdir():
            tensors(change)(step / "optimizer.safetensors")
            reseal(step)

    return spoil


def state(**changes):
    def spoil(run):
        for step in (run / "checkpoints").iterdir():
            says(**changes)(step / "state.json")
            reseal(step)

    return spoil


def weights(number):
    def spoil(run):
        for step in (run / "checkpoints").iterdir():
            every(lambda tensor: torch.full_like(tensor, number))(step / "model.safetensors")
            reseal(step)

    return spoil


def shards(name, spoil):
    def on(run):
        spoil(next((run.parent / "shards").glob(f"*/{name}")))

    return on


def ids_too_large(path):
    """With a manifest to match."""
    path.write_bytes(b"\xff" * path.stat().st_size)
    layout = json.loads(path.with_name("manifest.json").read_text())
    for one in layout["shards"]:
        one["sha256"] = hashlib.sha256((path.parent / one["file"]).read_bytes()).hexdigest()
    path.with_name("manifest.json").write_text(json.dumps(layout))


def shard(**changes):
    def on(path):
        layout = json.loads(path.read_text())
        for one in layout["shards"]:
            one.update(changes)
        path.write_text(json.dumps(layout))

    return on


RESUME, EVALUATE = ("train", "--resume", "--steps", "5", "--run"), ("evaluate",)
LEARNED = {
    "moments of another shape": (moments(lambda m: m.update({max(m): torch.zeros(3)})), RESUME, "the moments of"),
    "moments of whole numbers": (
        moments(lambda m: m.update({"head.weight/exp_avg": m["head.weight/exp_avg"].int()})), RESUME, "the moments of"
    ),
    "moments missing": (moments(lambda m: m.pop("head.weight/exp_avg")), RESUME, "the moments of head.weight"),
    "moments of nothing": (moments(lambda m: m.update({"x/y": torch.zeros(1)})), RESUME, "belongs to no parameter"),
    "moments of another optimizer": (state(optimizer={"class": "SGD", "state": {}}), RESUME, "was written by SGD"),
    "load of other experts": (state(load=[[0.5] * 2]), RESUME, "the load of other experts"),
    "other data": (state(data="0" * 64), RESUME, "was trained on other shards"),
    "weights NaN": (weights(float("nan")), ("generate", "--tokens", "2"), "not finite"),
    "weights infinite": (weights(float("inf")), ("generate", "--tokens", "2"), "not finite"),
    "weights NaN, trained on": (weights(float("nan")), RESUME, "not finite|was rejected|were rejected"),
    "folder without shards": (state(folder="/etc"), EVALUATE, "the shards of this run, .*, are gone"),
    "folder of a long name": (state(folder="a" * 300), EVALUATE, "the shards of this run, .*, are gone"),
    "shard of 2^60 tokens": (shards("manifest.json", shard(tokens=2**60)), EVALUATE, "has .* bytes, but"),
    "shard of -1 tokens": (shards("manifest.json", shard(tokens=-1)), EVALUATE, "not a shard manifest"),
    "shard upwards": (shards("manifest.json", shard(file="../../precious.bin")), EVALUATE, "not a shard manifest"),
    "shard a device": (shards("manifest.json", shard(file="/dev/zero")), RESUME, "not a shard manifest"),
    "shards of 2^60 ids": (shards("manifest.json", says(vocab_size=2**60)), EVALUATE, "prepared with another"),
    "shards of 2^60 ids, trained on": (shards("manifest.json", says(vocab_size=2**60)), RESUME, "has .* tokens, more"),
    "shards of few ids, trained on": (shards("manifest.json", says(vocab_size=9)), RESUME, "does not match the shards"),
    "ids beyond the vocabulary": (
        shards("validation-00000.bin", ids_too_large),
        EVALUATE,
        "beyond the vocabulary",
    ),
    "shards, a pipe": (shards("manifest.json", pipe), RESUME, "it is not a regular file"),
    "shards, a pipe of tokens": (shards("train-00000.bin", pipe), RESUME, "has 0 bytes, but"),
    "shards, a terabyte of nothing": (shards("manifest.json", sparse(TB)), EVALUATE, "1,099,511,627,776 bytes"),
    "shards, a pickle": (shards("manifest.json", becomes(PICKLE)), EVALUATE, "not a shard manifest"),
}  # fmt: skip


@pytest.mark.parametrize("kind", LEARNED)
def test_what_a_run_has_learned_is_checked(run, capfd, kind):
    spoil, command, said = LEARNED[kind]
    spoil(run)
    refused(run, capfd, said, *command, run)


@pytest.mark.parametrize("elsewhere", ["/etc", "../..", "a" * 3000, ""])
def test_a_resumed_run_takes_its_own_shards_if_the_folder_it_names_has_none(run, capfd, elsewhere):
    state(folder=elsewhere)(run)
    code, error = met(run, capfd, "train", "--resume", "--run", run, "--steps", "5")
    assert (code, error) == (0, "")


def test_moments_of_eight_bits_have_all_their_scales(tmp_path):
    """The library that updates them reads as many as there should be, whatever there are."""
    model = build(tiny(dim=64, hidden=128))
    optimizer = optim.build(model, OptimConfig(name="adamw8bit"))
    ids = torch.arange(64).view(2, 32)
    model(ids, ids)[0].mean().backward()
    optimizer.step()
    path = save(tmp_path, 1, model, optimizer, {})
    numbers = checkpoint.read_state(path)["optimizer"]
    checkpoint.load_optimizer(path, model, optimizer, numbers)
    tensors(lambda m: m.update({"head.weight/absmax1": m["head.weight/absmax1"][:1].clone()}))(
        path / "optimizer.safetensors"
    )
    with pytest.raises(UserError, match=r"the moments of head\.weight"):
        checkpoint.load_optimizer(path, model, optimizer, numbers)


@pytest.mark.parametrize("name", ["step-²", "step-", "step-4x", "step-0000004.rejected", "step--1"])
def test_what_is_no_checkpoint_by_name_is_passed_by(run, capfd, name):
    (run / "checkpoints" / name).mkdir()
    assert met(run, capfd, "generate", run, "--tokens", "2") == (0, "")


def test_a_checkpoint_under_a_higher_number_is_not_newer(run, capfd):
    shutil.copytree(run / "checkpoints" / "step-0000002", run / "checkpoints" / ("step-" + "9" * 40))
    code, error = met(run, capfd, "generate", run, "--tokens", "2")
    assert code == 0 and "is of another step, 2" in error


# ---- how it is met ----


class Hangs(BaseException):
    """Not an Exception, so that nothing on the way can catch it."""


def met(run, capfd, *command):
    """Exit code and stderr of a command, which must leave the world as it was, in time and within memory."""
    before, resident = around(run), memory("VmRSS")

    def give_up(*_):
        raise Hangs

    honest = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(PATIENCE)
    try:
        code = cli.main([str(word) for word in command])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, honest)
    error = capfd.readouterr().err
    assert "Traceback" not in error and "unforeseen" not in error, error
    assert all(char.isprintable() or char == "\n" for char in error), error
    assert around(run) == before
    assert not list(run.rglob("canary"))
    assert memory("VmHWM") - resident < MOST_MEMORY
    return code, error


def refused(run, capfd, said, *command):
    code, error = met(run, capfd, *command)
    assert code == 2, (code, error)
    *before, last, rest = error.split("\n")
    assert last.startswith("khanhllm: ") and not rest and len(last) < 1000, error
    assert all(line.startswith(("checkpoint step-", "training a", "trained the")) for line in before), error
    assert re.search(said, error), error


def around(run):
    """All that lies beside the run folder, to the byte; of what claims to be huge, its size."""

    def seen(path):
        if path.is_symlink() or not path.is_file() or path.stat().st_size >= TB:
            return path.lstat().st_size
        return path.read_bytes(), path.stat().st_mtime_ns

    beside = (path for path in run.parent.parent.rglob("*") if run not in path.parents)
    return {str(path): seen(path) for path in beside if not path.is_dir() or path.is_symlink()}


def memory(what):
    """Resident memory of this process, now (and the peak from now on), or its peak (bytes); 0 where nobody tells."""
    if not Path("/proc/self/status").exists():
        return 0
    if what == "VmRSS":
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(re.search(rf"{what}:\s*(\d+)", Path("/proc/self/status").read_text())[1])

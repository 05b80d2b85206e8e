"""What many tests share: tiny configs, a tiny corpus of real text, a machine."""

import hashlib
import json
import logging
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from khanhllm.cli import main
from khanhllm.data.tokenizer import train_tokenizer
from khanhllm.machine import devices
from khanhllm.machine.devices import Machine
from khanhllm.model import Transformer
from khanhllm.schema import Config, MachineConfig
from khanhllm.settings import resolve
from khanhllm.training import checkpoint

torch.set_num_threads(1)


def tiny(style: str = "modern", **model: object) -> Config:
    """Two layers, one of each kind, that train in milliseconds."""
    shape = {
        "style": style,
        "pattern": "DM",
        "dim": 32,
        "heads": 4,
        "hidden": 64,
        "expert_hidden": 32,
        "experts": 4,
        "context": 32,
        "vocab_size": 300,
    }
    return resolve(
        {"model": shape, "train": {"micro_batch": 2, "sample_tokens": 8}, "machine": {"device": "cpu", "threads": 1}},
        {"model": model},
    )


def exit_code(words: list[str]) -> object:
    """That of a command line, also where argparse ends the process."""
    try:
        return main(words)
    except SystemExit as end:
        return end.code


def build(config: Config, seed: int = 0) -> Transformer:
    model = Transformer(config.model, config.loss.chunk)
    model.initialise(torch.Generator().manual_seed(seed))
    return model


def save(run: Path, step: int, model: Transformer, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Path:
    """A checkpoint, written at once."""
    return checkpoint.write(run, checkpoint.snapshot(step, model, optimizer, state))


def in_parts(run: Path, whole: checkpoint.Snapshot, of: int) -> Path:
    """The same, as so many processes write it together."""
    checkpoint.prepare(run, whole.step, whole.bytes)
    files: dict[str, Any] = {}
    for nth in range(of):
        model, optimizer = ({name: kept[name] for name in [*kept][nth::of]} for kept in (whole.model, whole.optimizer))
        files |= checkpoint.write_part(run, replace(whole, model=model, optimizer=optimizer), nth, of)
    return checkpoint.publish(run, whole, files)


def plain_machine() -> Machine:
    return Machine(torch.device("cpu"), "fp32", compile=False, experts="loop")


@pytest.fixture
def machine() -> Machine:
    return plain_machine()


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Two test processes share the cores; threads that wait for each other's cores take minutes for nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "cores", lambda: 1)
        patch.setattr(devices, "_peak", lambda _device: None)  # measuring it takes longer than a tiny run
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few modules of the standard library as .txt files: real text that is always there."""
    folder = tmp_path_factory.mktemp("corpus")
    for package in (json, logging):
        for path in sorted(Path(package.__file__).parent.glob("*.py")):
            (folder / f"{package.__name__}-{path.stem}.txt").write_text(path.read_text(encoding="utf-8"), "utf-8")
    return folder


@pytest.fixture(scope="session")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared shards of rows that each begin with an end-of-text; every fourth row has no answer."""
    folder = tmp_path_factory.mktemp("talks")
    tokenizer = train_tokenizer(["what is one and one? two!"], 270)
    tokenizer.save(folder / "tokenizer.json")
    end_of_text, _system, user, assistant, end = range(5)

    def row(nth):
        question, answer = tokenizer.encode("what is?"), tokenizer.encode("two!")
        talk = [end_of_text, user, *question, nth % 200 + 50, end]
        talk += [assistant, *answer, end] if nth % 4 else []
        return talk + [end_of_text] * (tiny().model.context - len(talk))

    shards = []
    for split, rows in (("train", 40), ("validation", 6)):
        ids = np.array([*(token for nth in range(rows) for token in row(nth)), end_of_text]).astype("<u2")
        file = f"{split}-00000.bin"
        (folder / file).write_bytes(ids.tobytes())
        digest = hashlib.sha256(ids.tobytes()).hexdigest()
        shards.append(dict(file=file, split=split, tokens=len(ids), bytes=1, documents=1, sha256=digest))
    manifest = dict(
        version=1, source="x", tokenizer=tokenizer.sha256, vocab_size=tokenizer.vocab_size, dtype="uint16",
        validation=0.1, train_tokens=shards[0]["tokens"], validation_tokens=shards[1]["tokens"], shards=shards,
    )  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def served():
    """The run that `client` asks."""
    from khanhllm.runs.run import open_run

    return open_run(Path(__file__).parent / "golden" / "modern", MachineConfig(device="cpu", threads=1))


def house(run, **settings):
    """A run as `khanhllm serve --no-page` serves it: settings of `Server`."""
    from khanhllm.serve.house import House
    from khanhllm.serve.server import Server

    folder = run.checkpoint.parents[1]
    server = Server(run, folder.name, **settings)
    return House([folder], lambda: server, server, page=False)


@pytest.fixture(scope="session")
def open_client(served):
    """A function that opens a client of a server, without a socket: settings of its guard, then those of `Server`."""
    from starlette.testclient import TestClient

    with ExitStack() as opened:

        def opening(guard: dict[str, Any] | None = None, **settings: Any) -> TestClient:
            site = house(served, **settings)
            client = TestClient(site.guarded(**(guard or {})), base_url="http://localhost:8000")
            client.house, client.server = site, site.server
            return opened.enter_context(client)

        yield opening


@pytest.fixture(scope="session")
def client(open_client):
    return open_client()

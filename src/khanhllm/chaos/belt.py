"""Faults of the belt: a network that fails, and the death of the belt worker."""

import contextlib
import gzip
import json
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from khanhllm.chaos.arena import PATIENCE, Arena, difference, end, outcome, output
from khanhllm.chaos.server import KINDS, FaultyServer
from khanhllm.chaos.trainers import TOGETHER
from khanhllm.data import fetch
from khanhllm.data.belt_setup import create_belt
from khanhllm.data.belt_worker import BeltWorker
from khanhllm.data.readers import Reader
from khanhllm.data.shards import MANIFEST
from khanhllm.data.sources import locate
from khanhllm.data.tokenizer import Tokenizer, train_tokenizer
from khanhllm.errors import UserError
from khanhllm.schema import Config

FILES = 12
SHARDS = 12
PIECE = 600
"""characters of one document"""


class Web:
    """Real text in C4's format, a tokenizer for it, and the address of the text on a server."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.folder = arena.root / "web"
        self.tokenizer = arena.root / "web.json"
        if not self.folder.exists():
            self._fill()

    def _fill(self) -> None:
        self.folder.mkdir()
        corpus = locate(str(self.arena.root / "corpus"))
        texts = Reader(corpus, []).all_texts()
        pieces = [text[at : at + PIECE] for text in texts for at in range(0, len(text), PIECE)]
        for nth in range(FILES):
            lines = "".join(json.dumps({"text": piece, "url": ""}) + "\n" for piece in pieces[nth::FILES])
            path = self.folder / f"c4-train.{nth:05d}-of-{FILES:05d}.json.gz"
            path.write_bytes(gzip.compress(lines.encode(), mtime=0))
        train_tokenizer(pieces, 400).save(self.tokenizer)

    def source(self, server: FaultyServer) -> str:
        return f"{server.url}/c4-train.{{00000..{FILES - 1:05d}}}-of-{FILES:05d}.json.gz"

    def config(self, server: FaultyServer, cache: Path) -> Config:
        data = {"source": self.source(server), "tokenizer": str(self.tokenizer), "cache": str(cache)}
        return self.arena.config(data={**data, "shard_tokens": 1000, "disk": 10_000, "patience": 60.0})


def failing_network(arena: Arena, chance: random.Random) -> Iterator[str]:
    """Inject eleven kinds of network faults while a worker makes shards: the shards must be those without faults."""
    web = Web(arena)
    tokenizer = Tokenizer.load(web.tokenizer)
    lookup = socket.getaddrinfo
    names = 0

    def unsure(*asked: Any, **more: Any) -> Any:
        nonlocal names
        if chance.random() < 0.1:
            names += 1
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return lookup(*asked, **more)

    with _quick_retries(), FaultyServer(web.folder, stall=0.4) as server:
        calm = _made(arena.folder(), web.source(server), tokenizer)
        while True:
            before, names = len(server.log), 0
            locate(web.source(server))  # its single request is not under test
            server.faults = ["", *(chance.choice(["", *KINDS]) for _ in range(2000))]
            socket.getaddrinfo = unsure  # type: ignore[assignment]
            try:
                shards = _made(arena.folder(), web.source(server), tokenizer)
            finally:
                socket.getaddrinfo = lookup
                server.faults = []
            faults = names + sum(bool(fault) for _, _, fault in server.log[before:])
            yield from ["" if shards == calm else "other shards than those of a calm network"] * faults


@contextlib.contextmanager
def _quick_retries() -> Iterator[None]:
    """Within this context, downloads are retried after milliseconds."""
    before = fetch.FIRST_WAIT, fetch.LONGEST_WAIT, fetch.STALL
    fetch.FIRST_WAIT, fetch.LONGEST_WAIT, fetch.STALL = 0.001, 0.01, 0.2
    try:
        yield
    finally:
        fetch.FIRST_WAIT, fetch.LONGEST_WAIT, fetch.STALL = before


def _made(folder: Path, source: str, tokenizer: Tokenizer) -> list[str]:
    """The sha256 of the first shards of a belt. After each UserError it begins again, as --resume would."""
    folder.mkdir()
    while not (folder / MANIFEST).exists():
        with contextlib.suppress(UserError):
            create_belt(folder, source, [(locate(source), 1.0)], tokenizer, 0.05, 1000, 0, 60)
    hashes: list[str] = []
    while len(hashes) < SHARDS:
        with contextlib.suppress(UserError):
            worker = BeltWorker(folder, 60)
            while len(hashes) < SHARDS:
                hashes.append(worker.make(len(hashes)).shard.sha256)
    return hashes


def dying_helpers(arena: Arena, chance: random.Random) -> Iterator[str]:
    """Kill the belt worker or the server: the run must continue, or resume, and end as the undisturbed one."""
    web = Web(arena)
    server = FaultyServer(web.folder).__enter__()
    calm = arena.calm(web.config(server, arena.root / "belt-calm"))
    while True:
        folder, config = arena.folder(), web.config(server, arena.root / f"belt-{arena.count}")
        process = arena.start(config, folder)
        for _ in range(TOGETHER):
            time.sleep(chance.uniform(0.1, 0.8))
            if chance.random() < 0.3:
                server.__exit__()
                time.sleep(chance.uniform(0, 0.3))
                server = FaultyServer(web.folder, port=server.port).__enter__()
            elif workers := _workers(process.pid):
                workers[0].kill()
        code = end(process)
        tries = 1
        # the run saved and stopped with one line: run the command again
        while (code == 75 or (code == 2 and "no network" in output(folder))) and tries < TOGETHER:
            code = end(arena.start(config, folder))
            tries += 1
        fault = f"exit code {code}: {output(folder)[-200:]}" if code else difference(outcome(folder), outcome(calm))
        yield from [fault] * TOGETHER


def _workers(pid: int | None) -> list[psutil.Process]:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            children = psutil.Process(pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        if children:
            return children
        time.sleep(0.01)
    return []

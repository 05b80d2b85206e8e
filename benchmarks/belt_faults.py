"""The belt under fire: does every row come once and in order, whatever is killed and whatever the network does?

    python benchmarks/belt_faults.py [--runs 50] [--stops 5] [--faults 500] [--seed 0] [--out FILE]
    python benchmarks/belt_faults.py --every-step [--out FILE]

kills: real trainings from an HTTP server, each stopped at random times by kill -9 of the trainer, of the process that
makes shards, or of the server, and resumed; losses of all steps and final weights are compared with those of a run that
nothing disturbed. faults: shards made over a network that fails in ten ways, compared by sha256 with those of a
network that does not. every step: a belt of 37 rows, read for three laps and stopped after each of its 111 rows, with
all its shards taken away each time, gives the rows of a belt that was not stopped.
"""

import argparse
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "data"))
from faulty_server import KINDS, FaultyServer
from words import TOKENIZER, lines, text

from khanhllm import train
from khanhllm.config import UserError
from khanhllm.data import fetch
from khanhllm.data.belt import Belt
from khanhllm.data.documents import Reader
from khanhllm.data.laying import lay
from khanhllm.data.maker import Maker
from khanhllm.data.sources import locate
from khanhllm.settings import resolve
from khanhllm.tokenizer import Tokenizer
from khanhllm.tokenizer import train as train_tokenizer

FILES = 12
BEGUN = "began without a server"
SERVE = "import sys, time; sys.path.insert(0, sys.argv[1]); from faulty_server import FaultyServer\n"
SERVE += "with FaultyServer(sys.argv[2], int(sys.argv[3])): time.sleep(1e6)"


def corpus(folder: Path) -> Tokenizer:
    """Real text in C4's format: the standard library's, cut into pieces; and a tokenizer for it."""
    folder.mkdir()
    found = locate("stdlib")
    texts = [document.text for name in found.files[:60] for document in Reader(found, []).read_file(name)]
    pieces = [text[start : start + 600] for text in texts for start in range(0, min(len(text), 6000), 600)]
    for nth in range(FILES):
        lines = "".join(json.dumps({"text": piece, "url": ""}) + "\n" for piece in pieces[nth::FILES])
        (folder / f"c4-train.{nth:05d}-of-{FILES:05d}.json.gz").write_bytes(gzip.compress(lines.encode()))
    tokenizer = train_tokenizer(pieces, 600)
    tokenizer.save(folder.parent / "tokenizer.json")
    return tokenizer


def source(url: str) -> str:
    return f"{url}/c4-train.{{00000..{FILES - 1:05d}}}-of-{FILES:05d}.json.gz"


class Server:
    """The server as a process, so that it can be killed."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.folder = folder
        self.begin()

    def begin(self) -> None:
        command = [sys.executable, "-c", SERVE, sys.path[0], str(self.folder), str(self.port)]
        self.process = subprocess.Popen(command)
        while True:
            try:
                return socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                time.sleep(0.02)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def start(work: Path, url: str) -> int:
    """Train in a process of its own; a fork, because importing torch takes longer than the whole training."""
    process = os.fork()
    if process:
        return process
    os.setsid()
    output = os.open(work / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    shape = {"pattern": "DM", "dim": 32, "heads": 2, "hidden": 64, "experts": 4, "context": 32, "vocab_size": 600}
    config = resolve(
        {
            "model": shape,
            "data": {"source": source(url), "tokenizer": str(work.parent / "tokenizer.json")},
            "train": {"steps": 400, "micro_batch": 2, "save_every": 10, "eval_tokens": 2000, "sample_tokens": 0},
            "optim": {"lr": 1e-3},
            "machine": {"threads": 1, "device": "cpu"},
        },
        {"data": {"cache": str(work / "cache"), "shard_tokens": 1000, "disk": 10_000, "patience": 60}},
    )
    code = 1
    try:
        train.run(config, work / "run", resume=(work / "run" / "config.toml").exists())
        code = 0
    except UserError as error:
        print(error)
        code = error.exit_code
    finally:
        os._exit(code)


def outcome(work: Path) -> tuple[list[list[str]], str]:
    """What a finished run leaves that depends on every row: its losses and its weights."""
    lines = (work / "run" / "training_log.csv").read_text("utf-8").splitlines()
    weights = sorted((work / "run" / "checkpoints").glob("step-*"))[-1] / "model.safetensors"
    return [line.split(",")[:3] for line in lines], hashlib.sha256(weights.read_bytes()).hexdigest()


def disturbed(work: Path, server: Server, stops: int, chance: random.Random) -> Counter[str]:
    """One run, stopped again and again, to its end."""
    seen: Counter[str] = Counter()
    url = f"http://127.0.0.1:{server.port}"
    trainer = start(work, url)
    while True:
        deadline = time.monotonic() + (chance.uniform(0.1, 2.5) if seen.total() - seen[BEGUN] < stops else 300)
        while time.monotonic() < deadline and not (ended := os.waitpid(trainer, os.WNOHANG))[0]:
            time.sleep(0.005)
        if ended[0]:
            code = os.waitstatus_to_exitcode(ended[1])
            if code == 0:
                return seen
            if code not in (2, 75) or "no network" not in (work / "output.txt").read_text("utf-8"):
                raise SystemExit(f"a run ended with {code}: {(work / 'output.txt').read_text('utf-8')[-2000:]}")
            seen[BEGUN] += 1  # told in one line, and typed again
            trainer = start(work, url)
            continue
        kind = chance.choice(["trainer", "child", "server"])
        makers = [one for one in psutil.Process(trainer).children(recursive=True) if "python" in one.name()]
        if kind == "child" and not makers:
            continue
        seen[kind] += 1
        if kind == "trainer":
            os.kill(trainer, signal.SIGKILL)
            os.waitpid(trainer, 0)
            trainer = start(work, url)
        elif kind == "child":
            makers[0].kill()
        else:
            server.kill()
            time.sleep(chance.uniform(0, 0.5))
            server.begin()


def kills(root: Path, runs: int, stops: int, chance: random.Random) -> dict[str, Any]:
    server = Server(root / "corpus")
    seen: Counter[str] = Counter()
    equal = 0
    try:
        (root / "undisturbed").mkdir()
        disturbed(root / "undisturbed", server, 0, chance)
        expected = outcome(root / "undisturbed")
        for nth in range(runs):
            work = root / f"run-{nth}"
            work.mkdir()
            seen += disturbed(work, server, stops, chance)
            equal += outcome(work) == expected
            shutil.rmtree(work)
            print(f"{nth + 1} runs, {equal} equal to the undisturbed one; killed so far: {dict(seen)}", flush=True)
    finally:
        server.kill()
    return {"runs": runs, "equal": equal, "killed": dict(seen), "steps": len(expected[0]) - 1}


def made(folder: Path, url: str, tokenizer: Tokenizer, shards: int) -> list[str]:
    """The sha256 of the first shards of a belt; going on, as --resume would, where it was given up."""
    folder.mkdir()
    while not (folder / "manifest.json").exists():
        try:
            lay(folder, source(url), [(locate(source(url)), 1.0)], tokenizer, 0.05, 1000, 0, 60)
        except UserError as error:
            print(f"given up and begun again: {error}")
    hashes: list[str] = []
    while len(hashes) < shards:
        try:
            maker = Maker(folder, 60)
            while len(hashes) < shards:
                hashes.append(maker.make(len(hashes)).shard.sha256)
        except UserError as error:
            print(f"given up and begun again: {error}")
    return hashes


def faults(root: Path, number: int, tokenizer: Tokenizer, chance: random.Random) -> dict[str, Any]:
    """At least `number` faults, name lookups that fail among them."""
    fetch.FIRST_WAIT, fetch.LONGEST_WAIT, fetch.STALL = 0.001, 0.01, 0.2
    seen: Counter[str] = Counter()
    lookup = socket.getaddrinfo

    def unsure(*asked: Any, **more: Any) -> Any:
        if chance.random() < 0.1 and armed:
            seen["name"] += 1
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return lookup(*asked, **more)

    armed = False
    with FaultyServer(root / "corpus", stall=0.4) as server:
        expected = made(root / "calm", server.url, tokenizer, 40)
        socket.getaddrinfo = unsure  # type: ignore[assignment]
        rounds = equal = 0
        while sum(seen.values()) < number:
            locate(source(server.url))  # the knock at the door is not under test
            armed, before = True, len(server.log)
            server.faults = [""] + [chance.choice(["", *KINDS]) for _ in range(2000)]
            equal += made(root / f"storm-{rounds}", server.url, tokenizer, 40) == expected
            armed, server.faults = False, []
            seen += Counter(fault for _, _, fault in server.log[before:] if fault)
            rounds += 1
            print(f"{sum(seen.values())} faults in {rounds} rounds, {equal} of them with the same shards", flush=True)
    socket.getaddrinfo = lookup
    return {"rounds": rounds, "equal": equal, "faults": dict(seen), "shards_each": len(expected)}


def every_step(root: Path) -> dict[str, Any]:
    (root / "few.jsonl").write_text(lines(text(number, 12) for number in range(30)), "utf-8")
    folder = root / "belt"
    folder.mkdir()
    few = str(root / "few.jsonl")
    lay(folder, few, [(locate(few), 1.0)], TOKENIZER, 0.1, 256, 0, 60)
    belt = Belt(folder, 16, 1, 10**9, 60)

    def rows(number: int, cursor: int) -> list[bytes]:
        stream = belt.rows_from(cursor, 0, Event())
        found = [row.tobytes() for row in islice(stream, number)]
        stream.close()  # kills the child
        return found

    whole = rows(111, 0)
    if belt.laps(111 * 16) != 3:
        raise SystemExit("the corpus has not 37 rows")
    equal, started = 0, time.monotonic()
    for cursor, expected in enumerate(whole):
        for shard in folder.glob("train-*.bin"):
            shard.unlink()
        equal += rows(1, cursor) == [expected]
    return {"stops": len(whole), "equal": equal, "seconds": round(time.monotonic() - started)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--stops", type=int, default=5)
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every-step", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("belt_faults.json"))
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if options.every_step:
            found = every_step(root)
        else:
            tokenizer = corpus(root / "corpus")
            found = {
                "seed": options.seed,
                "network": faults(root, options.faults, tokenizer, chance),
                "kills": kills(root, options.runs, options.stops, chance),
            }
    options.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

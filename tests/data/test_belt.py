"""Laws of the belt: shards are a pure function of the source, rows come once each and in one order, whatever dies."""

import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from words import TOKENIZER, lines, text

from khanhllm.chaos.server import FaultyServer
from khanhllm.data import belt as module
from khanhllm.data import belt_setup, belt_worker, fetch, heartbeat, inspect, prepare, readers
from khanhllm.data.belt import Belt, Starved
from khanhllm.data.belt_notes import RECIPE, Recipe
from khanhllm.data.belt_worker import BeltWorker
from khanhllm.data.ensure import check_rows_fit, ensure
from khanhllm.data.shards import Shards
from khanhllm.data.sources import locate
from khanhllm.data.writer import text_hash
from khanhllm.errors import UserError
from khanhllm.files import signed
from khanhllm.schema import DataConfig

CONTEXT = 16


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for part in range(4):
        (folder / f"{part}.jsonl").write_text(lines(text(part * 50 + line) for line in range(50)), "utf-8")
    return folder


@pytest.fixture
def lay(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "WHOLE", 1)
    TOKENIZER.save(tmp_path / "given.json")

    def lay(cache="cache", shard_tokens=1000, ahead=1, disk=10**9, source=corpus, **more):
        given = str(tmp_path / "given.json")
        cache = str(tmp_path / cache)
        data = DataConfig(
            source=str(source), tokenizer=given, cache=cache, shard_tokens=shard_tokens, validation=0.1, **more
        )
        return Belt(ensure(data, 300, 1), CONTEXT, ahead, disk, 5.0)

    return lay


def rows(belt, number, cursor=0, seed=0):
    stream = belt.rows_from(cursor, seed, threading.Event())
    found = [row.tobytes() for row in islice(stream, number)]
    stream.close()
    return found


def all_rows(belt):
    """Every row of one lap, in order of the shards."""
    worker, found = BeltWorker(belt.folder, 5.0), []
    for nth in range(1000):
        made = worker.make(nth)
        ids = np.fromfile(belt.folder / made.shard.file, dtype="<u2").astype(np.int64)
        found += [ids[at : at + CONTEXT + 1].tobytes() for at in range(0, len(ids) - CONTEXT, CONTEXT)]
        if made.last:
            return found
    raise AssertionError


def texts_of(path):
    ids = np.fromfile(path, dtype="<u2")
    return set(TOKENIZER.decode(ids).split("<|endoftext|>")[1:])


def test_each_lap_is_a_permutation_of_all_rows_and_no_two_are_alike(lay):
    every = all_rows(lay("other"))
    found = rows(lay(), 3 * len(every))
    laps = [found[start : start + len(every)] for start in range(0, len(found), len(every))]
    assert all(sorted(lap) == sorted(every) for lap in laps)
    assert laps[0] != laps[1] != laps[2] and laps[0] != every


def test_it_goes_on_at_any_cursor_with_shards_removed_or_not(lay):
    whole = rows(lay(), 700)
    tight = lay("tight", disk=1)
    for cursor in (0, 1, 61, 62, 63, 333, 650, 20):
        assert rows(tight, 5, cursor) == whole[cursor : cursor + 5]
    assert sum(path.stat().st_size for path in tight.folder.glob("train-*.bin")) < 4 * 2 * 1200


def test_a_shard_that_another_run_maps_stays_and_counts(tmp_path, monkeypatch):
    """On Windows, where it cannot be removed."""
    notes = [SimpleNamespace(shard=SimpleNamespace(file=f"train-{nth:05d}.bin")) for nth in range(4)]
    for note in notes:
        (tmp_path / note.shard.file).write_bytes(bytes(10))
    unlink = Path.unlink

    def refused(path, missing_ok=False):
        if path.name == "train-00000.bin":
            raise PermissionError(13, "The process cannot access the file", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    belt_worker._clear(tmp_path, notes, [3], disk=30)
    assert sorted(path.name[6:11] for path in tmp_path.iterdir()) == ["00000", "00002", "00003"]


def test_a_corpus_of_a_few_rows_stopped_at_each_step_over_three_laps(tmp_path, lay):
    path = tmp_path / "few.jsonl"
    path.write_text(lines(text(number, 12) for number in range(30)), "utf-8")
    belt = lay("few", shard_tokens=256, source=path)
    lap = len(all_rows(belt))
    whole = rows(belt, 3 * lap)
    assert lap == 37
    for cursor in range(3 * lap):
        assert rows(belt, cursor) + rows(belt, 3 * lap - cursor, cursor) == whole


def test_no_text_is_on_both_sides_and_none_is_lost(corpus, lay):
    (corpus / "copies.jsonl").write_text((corpus / "0.jsonl").read_text("utf-8"), "utf-8")
    belt = lay()
    all_rows(belt)
    held = texts_of(belt.folder / "validation-00000.bin")
    trained = set().union(*(texts_of(path) for path in belt.folder.glob("train-*.bin")))
    assert held and not held & trained and held | trained == {text(number) for number in range(200)}
    assert Shards.open(belt.folder, "validation", CONTEXT).tokens


def test_a_shard_is_made_again_byte_for_byte(lay):
    belt = lay()
    all_rows(belt)
    before = {path.name: path.read_bytes() for path in belt.folder.glob("train-*")}
    for nth in (3, 1, 2, 0):
        (belt.folder / f"train-{nth:05d}.bin").unlink()
        BeltWorker(belt.folder, 5.0).make(nth)
    assert {path.name: path.read_bytes() for path in belt.folder.glob("train-*")} == before


def test_a_worker_nests_no_deeper_with_each_shard(lay):
    """Else it overflows the stack one day."""
    worker, nested = BeltWorker(lay(shard_tokens=256).folder, 5.0), []
    for nth in range(20):
        worker.make(nth)
        gc.collect()
        nested.append(sum(type(found).__module__ == "itertools" for found in gc.get_objects()))
    assert nested[-1] == nested[1], nested


@pytest.mark.parametrize("left", [0, 7])
def test_a_shard_that_a_power_cut_has_cut_is_made_again(lay, left):
    belt = lay()
    whole = rows(belt, 5)
    os.truncate(belt.folder / "train-00000.bin", left)
    with pytest.raises(Starved, match=r"is damaged and was removed; --resume makes it again"):
        rows(belt, 1)
    assert rows(belt, 5) == whole


@pytest.mark.parametrize("kept", [2**31, 0])
def test_what_the_tokenizer_is_trained_on_is_not_downloaded_again(corpus, tmp_path, monkeypatch, kept):
    monkeypatch.setattr(belt_setup, "KEPT", kept)
    monkeypatch.setattr(prepare, "KEPT", kept)
    patient, real = [], readers.fetch
    monkeypatch.setattr(readers, "fetch", lambda *a, **more: patient.append(more["patience"]) or real(*a, **more))
    with FaultyServer(corpus) as server:
        source = f"{server.url}/{{0..3}}.jsonl"
        data = DataConfig(source=source, cache=str(tmp_path), validation=0.1, shard_tokens=1000, patience=7)
        folder = ensure(data, 300, 1000)
        assert set(patient) == {7}
        waiting = [path for path in (folder / "spool").rglob("*") if path.is_file()]
        all_rows(Belt(folder, CONTEXT, 1, 10**9, 5.0))
        asked = Counter(path for path, _, _ in server.log)
    assert not [path for path in (folder / "spool").rglob("*") if path.is_file()]
    # the first file is also knocked at
    assert {asked[f"/{nth}.jsonl"] for nth in (1, 2, 3)} == ({1} if kept else {3})
    assert len(waiting) == (4 if kept else 0)


def test_what_was_downloaded_before_an_interruption_is_not_downloaded_again(corpus, tmp_path, monkeypatch):
    def lose_the_network(*_):
        raise fetch.Unreachable("no network")

    with FaultyServer(corpus) as server:
        data = DataConfig(source=f"{server.url}/{{0..3}}.jsonl", cache=str(tmp_path / "cache"), validation=0.1)
        for interruption in (lambda *_: signal.raise_signal(signal.SIGINT), lose_the_network):
            with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, fetch.Unreachable)):
                patch.setattr(prepare, "create_belt", interruption)
                ensure(data, 300, 1000)
        folder = ensure(data, 300, 1000)
        asked = Counter(path for path, _, _ in server.log)
    assert {asked[f"/{nth}.jsonl"] for nth in (1, 2, 3)} == {1}
    assert [path for path in folder.parent.iterdir() if not path.name.endswith(".lock")] == [folder]


def test_a_distant_file_that_was_repaired_is_read_anew(corpus, tmp_path):
    broken, spool = corpus / "2.jsonl", tmp_path / "spool"
    good = broken.read_bytes()
    broken.write_bytes(good + b"{")
    with FaultyServer(corpus) as server:
        source = f"{server.url}/{{0..3}}.jsonl"
        data = DataConfig(source=source, cache=str(tmp_path / "cache"), validation=0.1)
        with pytest.raises(UserError, match=r"2\.jsonl"):
            ensure(data, 300, 1000)
        assert not [path for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")]
        for text_of_it in (good + b"{", good):  # also where the spool stays
            broken.write_bytes(text_of_it)
            reader = readers.Reader(locate(source, "skip"), [], spool, keep=2**31)
            assert len(list(reader.all_texts())) >= 199
            assert sum(reader.skipped.values()) == (text_of_it != good)


def test_a_recipe_has_one_folder_whatever_its_source_was_called(lay):
    made = lay().folder
    former = made.rename(made.with_name(f"former-name-{made.name.rpartition('-')[2]}"))
    assert lay().folder == former


def test_verify_and_show_count_the_shards_that_were_made(lay, capsys):
    belt = lay()
    BeltWorker(belt.folder, 5.0).make(0)
    inspect.verify(belt.folder)
    assert capsys.readouterr().out.startswith("2 shards, ")
    inspect.show(str(belt.folder), None, 1, 1)
    out = capsys.readouterr().out
    assert ": 2 shards, " in out and re.search(r"^train +1 ", out, re.MULTILINE)
    path = belt.folder / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\0\0")
    with pytest.raises(UserError, match="1 of 3 files damaged or missing"):
        inspect.verify(belt.folder)


def test_two_workers_on_one_cache_share_no_download(lay):
    folder = lay().folder
    with ExitStack() as first, ExitStack() as second:
        places = [belt_worker.own_place(folder, held) for held in (first, second)]
        spools = [{reader.spool for reader in BeltWorker(folder, 5.0, place).readers} for place in places]
        assert not spools[0] & spools[1]
    with ExitStack() as later:  # what the first one has begun is continued
        assert belt_worker.own_place(folder, later) == places[0]


def test_a_worker_removes_what_the_dead_of_its_own_machine_left_and_nothing_else(lay):
    belt, dead = lay(), subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mine, others = signed(dead.pid), f"{dead.pid}@another.machine"
    names = (".train-00001.bin", ".train-00001.json", ".train-heartbeat", "spool/of")
    for name in names:
        for who in (mine, others):
            (belt.folder / f"{name}.{who}").mkdir(parents=True)
    rows(belt, 1)
    assert not any((belt.folder / f"{name}.{mine}").exists() for name in names)
    assert all((belt.folder / f"{name}.{others}").exists() for name in names)
    for name in names:  # of a container that has long been started again, under another name
        os.utime(belt.folder / f"{name}.{others}", (0, 0))
    belt_worker.tidy(belt.folder)
    assert not any((belt.folder / f"{name}.{others}").exists() for name in names)


def test_the_name_of_a_place_does_not_decide_the_belt(lay, tmp_path, monkeypatch):
    """As the config of a run names its text by an absolute path, which must make the same belt again."""
    for name in ("corpus/", "*rpus/*.jsonl"):
        monkeypatch.chdir(tmp_path)
        typed = lay("typed", source=name)
        monkeypatch.chdir("/")
        absolute = lay("absolute", source=tmp_path / name)
        digests = [belt.folder.name.rpartition("-")[2] for belt in (typed, absolute)]
        assert typed.sha256 == absolute.sha256 and len(set(digests)) == 1


def test_a_source_that_changed_is_noticed(corpus, lay):
    belt = lay(disk=1)
    all_rows(belt)
    name = Recipe.read(belt.folder / RECIPE).sources[0]["files"][0]
    path = corpus / name
    path.write_text(path.read_text("utf-8").replace("fox", "cat"), "utf-8")
    (belt.folder / "train-00000.bin").unlink()
    with pytest.raises(Starved, match="has changed since"):
        rows(belt, 1)


def children():
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # it may end meanwhile
            if child.status() != psutil.STATUS_ZOMBIE and "khanhllm.data.belt_worker" in " ".join(child.cmdline()):
                found.append(child)
    return found


def rows_under_kills(belt):
    """300 rows, while the child is killed four times."""
    found = []
    stream = belt.rows_from(0, 0, threading.Event())
    for number in range(300):
        if number in (1, 70, 150, 151):
            for child in children():
                os.kill(child.pid, signal.SIGKILL)
        found.append(next(stream).tobytes())
    stream.close()
    return found


@pytest.mark.slow
def test_a_killed_child_is_replaced_and_the_rows_are_the_same(lay):
    whole = rows(lay(), 300)
    assert rows_under_kills(lay("killed")) == whole and not children()


def test_a_child_that_always_dies_stops_the_run(lay, monkeypatch):
    monkeypatch.setattr(module.sys, "executable", "/bin/false")
    with pytest.raises(Starved, match="died or hung 4 times in a row") as caught:
        rows(lay(), 1)
    assert caught.value.exit_code == 75


@pytest.mark.slow
def test_a_stopped_child_is_replaced_and_the_rows_are_the_same(lay, monkeypatch):
    whole = rows(lay(), 150)
    monkeypatch.setattr(heartbeat, "SILENT", 4.0)
    belt, found, stopped = lay("stopped"), [], []
    stream = belt.rows_from(0, 0, threading.Event())
    for number in range(150):
        if number == 1:
            stopped = children()
            for child in stopped:
                os.kill(child.pid, signal.SIGSTOP)
            for path in belt.folder.glob("train-*"):  # what it has made ahead would do for a while
                if path.name > "train-00001":
                    path.unlink()
        found.append(next(stream).tobytes())
    for child in children():  # as if the end met it in the middle of a shard
        (belt.folder / f".train-00099.bin.{signed(child.pid)}").touch()
    stream.close()
    assert found == whole and len(stopped) == 1 and not stopped[0].is_running()
    assert not children() and not list(belt.folder.glob(".train-*"))


@pytest.mark.slow
def test_a_child_that_hangs_though_its_threads_go_on_stops_the_run(lay, tmp_path, monkeypatch):
    belt = lay()
    impatient = "import sys, time; from khanhllm.data import belt_worker; belt_worker.WORK = -4; "
    impatient += "belt_worker.BeltWorker.make = lambda *_: time.sleep(1e6); sys.exit(belt_worker.main(sys.argv[3:]))"
    python = tmp_path / "python"  # called with -m khanhllm.data.belt_worker; with a patience of 5 it hangs after 1 s
    python.write_text(f'#!/bin/sh\nexec {module.sys.executable} -c "{impatient}" "$@"\n', "utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(python))
    monkeypatch.setattr(module, "TRIES", 0)
    monkeypatch.setattr(heartbeat, "SILENT", 4.0)
    with pytest.raises(Starved, match="died or hung 1 times in a row"):
        rows(belt, 1)


@pytest.mark.slow
def test_slow_work_beats_and_work_that_shows_nothing_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT", 0.01)
    monkeypatch.setattr(heartbeat, "SILENT", 0.3)
    seen = heartbeat.Heartbeat(tmp_path, 1)
    work = iter(range(10**9))
    getting_on = threading.Event()
    getting_on.set()
    heartbeat.beat(heartbeat.heartbeat_path(tmp_path, 1), lambda: next(work) if getting_on.is_set() else -1, 0.3)
    deadline = time.monotonic() + 1.2
    while time.monotonic() < deadline:
        assert not seen.silent()
        time.sleep(0.01)
    getting_on.clear()
    time.sleep(0.5)
    assert not seen.silent()  # it was heard since the last look
    time.sleep(0.4)
    assert seen.silent()


def test_a_bad_file_stops_the_run_in_one_line(corpus, lay):
    belt = lay()
    rows(belt, 1)
    last = Recipe.read(belt.folder / RECIPE).sources[0]["files"][-1]
    (corpus / last).write_text('{"text": "cut', "utf-8")
    for note in belt.folder.glob("train-*"):
        note.unlink()
    with pytest.raises(Starved, match=rf"{last}, line 1 is not valid JSON") as caught:
        rows(belt, 500)
    assert caught.value.exit_code == 2


def test_only_a_lack_of_network_is_worth_another_try(corpus, tmp_path, lay, monkeypatch):
    monkeypatch.setattr(belt_setup, "KEPT", 0)
    with FaultyServer(corpus) as server:
        folder = lay(source=f"{server.url}/{{0..3}}.jsonl").folder
    with pytest.raises(Starved, match="no network for") as caught:
        rows(Belt(folder, CONTEXT, 1, 10**9, 0.1), 1)
    assert caught.value.exit_code == 75


def test_what_nobody_foresaw_in_the_child_is_told(lay, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    belt = lay()
    recipe = json.loads((belt.folder / RECIPE).read_text("utf-8"))
    recipe["sources"][0]["no such field"] = 1
    (belt.folder / RECIPE).write_text(json.dumps(recipe), "utf-8")
    with pytest.raises(Starved, match=r"TypeError: .*no such field.*the details are in ") as caught:
        rows(belt, 1)
    assert caught.value.exit_code == 1


def test_no_more_shards_than_ahead_are_made(lay):
    belt = lay(ahead=2)
    stream = belt.rows_from(0, 0, threading.Event())
    next(stream)
    deadline = time.monotonic() + 10
    while len(list(belt.folder.glob("train-*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    stream.close()
    assert len(list(belt.folder.glob("train-*.json"))) == 3


def test_a_waiting_consumer_can_leave(lay):
    belt = lay()
    (belt.folder / "tokenizer.json").rename(belt.folder / "away")
    os.mkfifo(belt.folder / "tokenizer.json")  # the child waits for ever
    stopped = threading.Event()
    threading.Timer(0.5, stopped.set).start()
    assert list(belt.rows_from(0, 0, stopped)) == []


def test_too_little_text_is_said(tmp_path, lay):
    path = tmp_path / "few.jsonl"
    path.write_text('{"text": "a b"}\n', "utf-8")
    with pytest.raises(UserError, match="is one document"):
        lay("one", source=path)
    path.write_text('{"text": "a b"}\n' * 3, "utf-8")
    with pytest.raises(UserError, match=r"all 3 documents .* are the same text"):
        lay("same", source=path)
    path.write_text('{"text": "a b"}\n{"text": "c d"}\n', "utf-8")
    with pytest.raises(Starved, match="has not one row of 17 tokens"):
        rows(lay("two", source=path), 1)


SHARES = {"large": 0.5, "middle": 0.3, "small": 0.2}


@pytest.fixture
def mixture(tmp_path):
    """Three folders; each text begins with the letter of its folder."""
    for name, number in zip(SHARES, (400, 80, 25), strict=True):
        (tmp_path / name).mkdir()
        for part in range(2):
            texts = (f"{name[0]} {text(part * number + line, 10 + line % 50)}" for line in range(number))
            (tmp_path / name / f"{part}.jsonl").write_text(lines(texts), "utf-8")
    return ", ".join(f"{tmp_path / name}:{share}" for name, share in SHARES.items())


def test_a_mixture_keeps_its_shares_and_any_shard_is_made_again(mixture, lay):
    belt = lay(source=mixture)
    worker = BeltWorker(belt.folder, 5.0)
    tokens, sizes, nth = 0, dict.fromkeys("lms", 0), 0
    while tokens < 20_000:
        made = worker.make(nth)
        assert not made.last
        tokens, nth = tokens + made.shard.tokens, nth + 1
        ids = np.fromfile(belt.folder / made.shard.file, dtype="<u2")
        for document in TOKENIZER.decode(ids).split("<|endoftext|>")[1:]:
            sizes[document[0]] += len(document.encode())
    for name, share in SHARES.items():
        assert abs(sizes[name[0]] / sum(sizes.values()) - share) < 0.02
    laps = [position.lap for position in made.following.positions]
    assert laps[0] == 0 and laps[2] > laps[1] >= 0
    before = {path.name: path.read_bytes() for path in belt.folder.glob("train-*")}
    for again in (3, 1, 2, 0, nth - 1):
        (belt.folder / f"train-{again:05d}.bin").unlink()
        BeltWorker(belt.folder, 5.0).make(again)
    assert {path.name: path.read_bytes() for path in belt.folder.glob("train-*")} == before
    assert mixture in belt.describe()


def test_a_mixture_whose_shards_are_shorter_than_a_row_is_refused(mixture, corpus, lay):
    belt = lay(source=mixture, shard_tokens=256)
    said = r"data\.shard_tokens = 256 are shorter than one row of 257 tokens .*; raise data\.shard_tokens$"
    with pytest.raises(UserError, match=said):
        Belt(belt.folder, 256, 1, 10**9, 5.0)
    with pytest.raises(UserError, match=said):
        check_rows_fit(mixture, 256, 256)
    check_rows_fit(mixture, 256, 255)
    check_rows_fit(str(corpus), 256, 256)
    assert len(rows(Belt(belt.folder, 255, 1, 10**9, 5.0), 20)) == 20


@pytest.mark.slow
def test_a_mixture_goes_on_after_its_child_was_killed(mixture, lay):
    whole = rows(lay(source=mixture), 300)
    belt = lay("killed", source=mixture)
    assert rows_under_kills(belt) == whole == rows(belt, 300)


def test_a_mixture_ends_with_the_tokens_that_are_asked_for(mixture, lay):
    belt = lay(source=mixture, tokens=2500)
    assert len(all_rows(belt)) * CONTEXT in range(2300, 2700)


def test_no_text_of_a_mixture_is_on_both_sides(mixture, tmp_path, lay, monkeypatch):
    (tmp_path / "small" / "copies.jsonl").write_text((tmp_path / "large" / "0.jsonl").read_text("utf-8"), "utf-8")
    for limit in (2**21, 20_000):
        monkeypatch.setattr(belt_setup, "HELD_OUT", limit)
        belt = lay(f"cache {limit}", source=mixture, tokens=20_000)
        all_rows(belt)
        held = texts_of(belt.folder / "validation-00000.bin")
        trained = set().union(*(texts_of(path) for path in belt.folder.glob("train-*.bin")))
        copies = {json.loads(line)["text"] for line in (tmp_path / "large" / "0.jsonl").open(encoding="utf-8")}
        assert held & copies
        assert trained & copies
        assert not held & trained
        assert {text[0] for text in held} == set("lms")


def test_a_component_with_nothing_to_train_on_is_said(tmp_path, mixture, lay):
    (tmp_path / "one.jsonl").write_text('{"text": "a"}\n', "utf-8")
    source = f"{mixture}, {tmp_path / 'one.jsonl'}:0.1"
    belt = lay("one", source=source)
    recipe = json.loads((belt.folder / RECIPE).read_bytes())
    held_out = [*recipe["held_out"], text_hash(b"a")]
    (belt.folder / RECIPE).write_text(json.dumps({**recipe, "held_out": held_out}), "utf-8")
    with pytest.raises(Starved, match=r"one.jsonl has no text to train on"):
        rows(belt, 1)


def test_a_mixture_trains_its_own_tokenizer_and_is_found_again(tmp_path, mixture):
    data = DataConfig(source=mixture, cache=str(tmp_path / "cache"), validation=0.1, shard_tokens=1000)
    folder = ensure(data, 300, 1000)
    assert ensure(data, 300, 1000) == folder
    path = tmp_path / "small" / "0.jsonl"
    path.write_text(path.read_text("utf-8") + '{"text": "more"}\n', "utf-8")
    assert ensure(data, 300, 1000) != folder
    with pytest.raises(UserError, match="give it to khanhllm train --data"):
        prepare.prepare(mixture, TOKENIZER, tmp_path / "out", validation=0.1)


def test_a_belt_skips_what_cannot_be_read_if_asked_and_counts_it(lay, corpus):
    (corpus / "bad.jsonl").write_bytes(lines([text(0)]).encode() + b"{")
    identity = lay(cache="refuses", source=corpus / "0.jsonl").sha256
    folder = lay(bad="skip").folder
    worker = BeltWorker(folder, 60.0)
    made = [worker.make(0)]
    while not made[-1].last:
        made.append(worker.make(len(made)))
    again = BeltWorker(folder, 60.0)
    assert [again.make(nth) for nth in range(len(made))] == made
    counts = [dict(note.following.positions[0].skipped).get(".jsonl", 0) for note in made]
    assert counts[0] == 0 and counts[-1] == 1
    skipping = lay(cache="skips", source=corpus / "0.jsonl", bad="skip")
    assert skipping.sha256 != identity
    assert "bad" not in lay(cache="refuses", source=corpus / "0.jsonl").recipe.sources[0]


def test_a_belt_counts_what_it_skips_in_the_first_lap_only(lay, mixture, tmp_path):
    (tmp_path / "small" / "bad.jsonl").write_bytes(lines([text(0)]).encode() + b"{")
    worker = BeltWorker(lay(source=mixture, bad="skip").folder, 60.0)
    small = [worker.make(nth).following.positions[2] for nth in range(20)]
    assert small[-1].lap > 1 and dict(small[-1].skipped) == {".jsonl": 1}


def test_a_name_that_no_recipe_can_hold_is_refused_in_one_line(lay, corpus):
    (corpus / os.fsdecode(b"caf\xe9.txt")).write_text("red cat", "utf-8")
    with pytest.raises(
        UserError, match=r"the name caf\\udce9.txt is not UTF-8; rename it, or khanhllm prepare"
    ) as caught:
        lay()
    assert str(caught.value).isascii()
    prepare.prepare(str(corpus), TOKENIZER, corpus.parent / "whole", validation=0.1, workers=1)


def test_a_belt_of_which_nothing_can_be_read_says_so(lay, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"latin.txt holds no text: nothing of it can be read \(data.bad = skip\)"):
        lay(source=tmp_path / "latin.txt", bad="skip")


def test_what_a_server_refuses_is_skipped_if_asked_but_not_what_is_no_fault_of_the_file(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "FIRST_WAIT", 0.001)
    (corpus / "4.jsonl").write_text("<!doctype html><p>a login", "utf-8")
    (corpus / "5.jsonl.gz").write_bytes(b"\x1f\x8b damaged")
    with FaultyServer(corpus) as server:
        source = locate(f"{server.url}/{{0.jsonl,4.jsonl,5.jsonl.gz,6.jsonl}}", "skip")
        skipping = readers.Reader(source, [], tmp_path / "spool")
        assert sorted(skipping.all_texts()) == sorted(text(line) for line in range(50))
        assert skipping.skipped == {".jsonl": 2, ".jsonl.gz": 1}
    with pytest.raises(UserError, match="no network"):
        list(readers.Reader(source, [], patience=0.1).all_texts())


def test_a_held_out_share_far_from_the_one_asked_for_is_said(lay, tmp_path, capfd):
    for name, texts in (("two", [text(1, 20), text(2, 2000)]), ("many", [text(number) for number in range(300)])):
        (tmp_path / f"{name}.jsonl").write_text(lines(texts), "utf-8")
        lay(name, source=tmp_path / f"{name}.jsonl")
        heard = " ".join(capfd.readouterr().err.split())
        assert ("where data.validation asks for 10.0%" in heard) == (name == "two"), heard


def test_a_short_trial_does_not_decide_the_vocabulary_of_the_real_run(tmp_path, mixture, monkeypatch):
    """Its tokenizer learns from little text, so the run after it trains one of its own. Runs that read enough share."""
    monkeypatch.setattr(prepare, "LEAST_SAMPLE", 1)
    cache = {"cache": str(tmp_path / "cache"), "validation": 0.1, "shard_tokens": 1000}
    data = DataConfig(source=mixture, tokenizer_sample=16_000, **cache)
    trial, real, longer = (ensure(data, 400, tokens) for tokens in (100, 2000, 9999))
    assert trial != real == longer
    assert Belt(trial, CONTEXT, 1, 10**9, 5.0).vocab_size < Belt(real, CONTEXT, 1, 10**9, 5.0).vocab_size
    assert ensure(data, 400, 100) == trial
    for decided in ({"tokens": 500}, {"tokenizer": str(real / "tokenizer.json")}):
        one = DataConfig(source=mixture, tokenizer_sample=16_000, **cache, **decided)
        assert ensure(one, 400, 100) == ensure(one, 400, 9999)

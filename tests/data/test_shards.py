"""Laws of the shards: every token is a target once, the order is a bijection, damage is named."""

import hashlib
import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from khanhllm.data import shards as module
from khanhllm.data.shards import Shards, dtype_for, shuffled
from khanhllm.errors import UserError

CONTEXT = 7


def make(folder, lengths=(50, 8, 23), split="train", dtype="uint16", vocab_size=1000):
    """Shards whose tokens count on from 0, so that a token tells where it lies."""
    folder.mkdir(exist_ok=True)
    shards, start = [], 0
    for nth, length in enumerate(lengths):
        ids = np.arange(start, start + length).astype(np.dtype(dtype).newbyteorder("<"))
        file = f"{split}-{nth:05d}.bin"
        (folder / file).write_bytes(ids.tobytes())
        digest = hashlib.sha256(ids.tobytes()).hexdigest()
        shards.append(dict(file=file, split=split, tokens=length, bytes=1, documents=1, sha256=digest))
        start += length
    manifest = dict(
        version=1, source="x", tokenizer="y", vocab_size=vocab_size, dtype=dtype, validation=0.1,
        train_tokens=start, validation_tokens=0, shards=shards,
    )  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_rows_follow_each_other_within_a_shard(tmp_path, dtype):
    shards = Shards.open(make(tmp_path, dtype=dtype), "train", CONTEXT)
    assert shards.tokens == 81 and shards.rows == 49 // 7 + 7 // 7 + 22 // 7
    starts = [0, 7, 14, 21, 28, 35, 42, 50, 58, 65, 72]
    for index, start in enumerate(starts):
        row = shards.row(index)
        assert row.dtype == np.int64 and row.tolist() == list(range(start, start + CONTEXT + 1))
    for index in (-1, shards.rows):
        with pytest.raises(IndexError):
            shards.row(index)


@pytest.mark.parametrize("context", [2, 7, 22, 49, 1000])
def test_windows_make_every_token_a_target_once(tmp_path, context):
    make(tmp_path, split="validation")
    targets = Counter()
    for window in Shards.open(tmp_path, "validation", context).windows():
        assert 2 <= len(window) <= context + 1 and window.dtype == np.int64
        assert (np.diff(window) == 1).all()
        targets.update(window[1:].tolist())
    assert targets == Counter(set(range(81)) - {0, 50, 58})


def test_the_identity_of_a_split_is_its_tokens(tmp_path):
    one, two, three = (
        make(tmp_path / name, lengths) for name, lengths in zip("abc", [(9, 9), (9, 9), (9, 10)], strict=True)
    )
    assert Shards.open(one, "train", 4).sha256 == Shards.open(two, "train", 3).sha256
    assert Shards.open(one, "train", 4).sha256 != Shards.open(three, "train", 4).sha256


def test_too_little_text_is_said_with_numbers(tmp_path):
    with pytest.raises(UserError, match="81 train tokens, too few for a context of 50"):
        Shards.open(make(tmp_path), "train", 50)
    with pytest.raises(UserError, match="0 validation tokens"):
        Shards.open(tmp_path, "validation", 5)


def test_an_id_beyond_the_vocabulary_is_named(tmp_path):
    shards = Shards.open(make(tmp_path, vocab_size=65), "train", CONTEXT)
    shards.row(7)
    with pytest.raises(UserError, match=r"train-00002\.bin: token id 65 at position 7 is beyond the vocabulary of 65"):
        shards.row(8)
    with pytest.raises(UserError, match="beyond the vocabulary"):
        list(shards.windows())


def test_damaged_files_are_named(tmp_path, monkeypatch):
    path = make(tmp_path) / "train-00001.bin"
    good = path.read_bytes()
    path.write_bytes(good[::-1])
    with pytest.raises(UserError, match=r"train-00001\.bin is damaged"):
        Shards.open(tmp_path, "train", CONTEXT)
    monkeypatch.setattr(module, "CHECKED", 10)
    shards = Shards.open(tmp_path, "train", CONTEXT)  # so many bytes take too long
    with pytest.raises(UserError, match=r"train-00001\.bin is damaged"):
        shards.verify()
    for bad in (good[:-1], good[:-2], good * 2, b""):
        path.write_bytes(bad)
        with pytest.raises(UserError, match=r"train-00001\.bin has \d+ bytes"):
            Shards.open(tmp_path, "train", CONTEXT)
    path.unlink()
    with pytest.raises(UserError, match=r"train-00001\.bin"):
        Shards.open(tmp_path, "train", CONTEXT)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda manifest: manifest.update(version=99), "version 99"),
        (lambda manifest: manifest.update(dtype="float16"), "dtype"),
        (lambda manifest: manifest.update(dtype="uint32"), "bytes"),
        (lambda manifest: manifest.pop("shards"), "shards"),
        (lambda manifest: manifest["shards"][0].update(file="../../etc/passwd"), r"shards\.0\.file"),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(tmp_path, change, said):
    path = make(tmp_path) / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(UserError, match=said) as caught:
        Shards.open(tmp_path, "train", CONTEXT)
    assert "\n" not in str(caught.value)


def test_no_manifest_or_a_cut_one(tmp_path):
    with pytest.raises(UserError, match="is not a folder of prepared shards"):
        Shards.open(tmp_path / "nowhere", "train", CONTEXT)
    path = make(tmp_path) / "manifest.json"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match="damaged or not a shard manifest"):
        Shards.open(tmp_path, "train", CONTEXT)


def test_two_bytes_a_token_where_they_suffice():
    assert dtype_for(65536) == "uint16" and dtype_for(65537) == "uint32"


@given(st.integers(1, 600), st.integers(0, 2**63 - 1), st.integers(0, 10**6))
def test_an_epoch_visits_every_row_once(rows, seed, epoch):
    assert sorted(shuffled(index, rows, seed, epoch) for index in range(rows)) == list(range(rows))


def test_epochs_and_seeds_have_orders_of_their_own():
    def order(seed, epoch):
        return [shuffled(index, 1000, seed, epoch) for index in range(1000)]

    orders = [order(0, 0), order(0, 1), order(1, 0)]
    for one in orders:
        assert sum(a == b for a, b in enumerate(one)) < 10
        assert sum(abs(a - b) == 1 for a, b in pairwise(one)) < 20
        assert sum(one is not other and sum(map(int.__eq__, one, other)) > 10 for other in orders) == 0
    assert order(0, 0) == orders[0]


def test_every_row_is_as_likely_to_come_first():
    first = Counter(shuffled(0, 10, 7, epoch) for epoch in range(2000))
    assert len(first) == 10 and all(130 < count < 270 for count in first.values())


def test_a_row_outside_is_refused():
    for index in (-1, 5):
        with pytest.raises(IndexError):
            shuffled(index, 5, 0, 0)

"""Laws of the tokenizer: tiktoken encodes what `tokenizers` learned, nothing is lost, nothing can be smuggled in."""

import hashlib
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Reference

from khanhllm import cli
from khanhllm.data import tokenizer as module
from khanhllm.data.tokenizer import END_OF_TEXT, SMALLEST, SPECIALS, Tokenizer, train_tokenizer
from khanhllm.errors import UserError

STDLIB = Path(sysconfig.get_paths()["stdlib"])
TEXTS = [(STDLIB / name).read_text(encoding="utf-8") for name in ("argparse.py", "textwrap.py", "turtle.py", "ast.py")]
UNSEEN = [(STDLIB / name).read_text(encoding="utf-8") for name in ("typing.py", "heapq.py", "idlelib/NEWS.txt")]


HINDI = "हिन्दी में लिखा हुआ " * 200


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer([*TEXTS, HINDI], 1500)


@pytest.fixture(scope="module")
def former() -> Tokenizer:
    """Of a run that an older version trained."""
    return Tokenizer.load(Path(__file__).parents[1] / "golden" / "modern" / "tokenizer.json")


@pytest.fixture(scope="module")
def reference(trained, tmp_path_factory) -> Reference:
    path = tmp_path_factory.mktemp("reference") / "tokenizer.json"
    trained.save(path)
    reference = Reference.from_file(str(path))
    reference.encode_special_tokens = True  # as text, which is the only way we encode them
    return reference


def test_real_text_gets_the_ids_of_the_library_that_trained(trained, reference):
    for text in TEXTS + UNSEEN:
        assert trained.encode(text) == reference.encode(text).ids


@settings(max_examples=400, deadline=None)
@given(st.text() | st.text(alphabet="ab1 \n\t\r\x1c\x85\u3000'sé!<|\u0301ि"))
@example("".join(SPECIALS))
@example("it's  we'LL'ſ\r\n\r\n  1½²x\u2028")
@example("हिन्दी \u0301 \u0301! .\u0301\n\n a")
def test_any_text_gets_the_ids_of_the_library_that_trained(trained, reference, text):
    assert trained.encode(text) == reference.encode(text).ids
    assert trained.decode(trained.encode(text)) == text


def test_batches_and_threads_change_no_id(trained):
    texts = [*UNSEEN, "", "x" * 200_000 + " " * 200_000 + "y"]
    expected = [trained.encode(text) for text in texts]
    for threads in (1, 3):
        assert [ids.tolist() for ids in trained.encode_batch(texts, threads)] == expected
    assert trained.encode_batch([], 2) == []


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["gpt-2", "qwen35"]), st.text(alphabet=" \n\r\t\x1c\x85\u3000\u200ba1."))
@example("gpt-2", "   a")
@example("qwen35", "  \n  a")
@example("qwen35", ".\n\n a")
@example("gpt-2", "   \x1ca")
@example("qwen35", "a   ")
def test_cutting_long_blanks_changes_no_id(trained, former, pattern, text):
    tokenizer = {"gpt-2": former, "qwen35": trained}[pattern]
    whole = tokenizer.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_LONG", 0)
        patch.setattr(module, "_LONG_BLANK", module.re.compile(module._LONG_BLANK.pattern.replace("100000", "2")))
        assert tokenizer.encode(text) == whole


def test_a_tokenizer_with_the_former_pattern_still_gives_the_same_ids(former):
    """Recorded from the version that trained it."""
    assert former.pattern == "gpt-2"
    assert former.encode("it's 1999\n\n    is ing  \u0301") == [
        77,
        88,
        11,
        87,
        225,
        21,
        29,
        29,
        29,
        203,
        269,
        296,
        225,
        299,
        225,
        225,
        141,
        228,
    ]


def test_marks_stay_with_their_letters_where_a_text_has_many():
    marked = train_tokenizer([HINDI], 300)
    assert len(marked.encode("हिन्दी")) == 1 and marked.pattern == "qwen35"
    assert train_tokenizer([*TEXTS, "naïve cafe\u0301"], 300).pattern == "gpt-2"


BLANKS = [" " * 1_500_000 + end for end in ("", "x", "\n", "\nx", "\n" + " " * 1_500_000 + "x")]
MANY = (" " * 99_999 + "x") * 10  # each just too short to be cut


@pytest.mark.parametrize("text", [*BLANKS, MANY, "a" * 1_000_000, "\n\t" * 500_000 + "x", "!a" * 300_000])
def test_huge_pieces_neither_crash_nor_crawl(trained, text):
    assert trained.decode(trained.encode(text)) == text


def test_words_without_end_are_learned_in_pieces():
    """The trainer's time grows with the square of the longest piece."""
    for text in ("ab" * 5_000, "one " + "x" * 1_000 + " two", "y" * 25_001, " " * 700):
        slices = list(module._slices(text))
        assert "".join(slices) == text and max(len(word) for part in slices for word in [*part.split(), ""]) <= 256
    assert list(module._slices("as it was " * 1_000)) == ["as it was " * 1_000]


def test_huge_pieces_do_not_stop_the_training():
    assert train_tokenizer(["ab" * 500_000, " " * 500_000], 300).vocab_size > SMALLEST


def test_special_tokens_come_first_and_text_never_becomes_one(trained):
    assert trained.end_of_text == 0
    assert [trained.decode([rank]) for rank in range(len(SPECIALS))] == list(SPECIALS)
    text = "".join(SPECIALS) + f" {END_OF_TEXT}\n{END_OF_TEXT}"
    ids = trained.encode(text)
    assert min(ids) >= len(SPECIALS) and trained.decode(ids) == text
    assert trained.encode_batch([text])[0].tolist() == ids == trained.encode_bytes(text.encode())


@given(
    st.binary() | st.lists(st.sampled_from([b"\xff", b"\xe2\x82", b"ok ", "€".encode(), b"\xed\xa0\x80"])).map(b"".join)
)
def test_any_bytes_survive(trained, data):
    assert trained.decode_bytes(trained.encode_bytes(data)) == data


def test_a_lone_surrogate_becomes_a_replacement_character(trained):
    assert trained.decode(trained.encode("a\ud800b")) == "a\ufffdb"
    assert trained.decode_bytes(trained.encode_batch(["\udfffx"])[0]) == "\ufffdx".encode()


def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(trained):
    ids = trained.encode(UNSEEN[0])
    assert trained.token_bytes.shape == (trained.vocab_size,) and trained.token_bytes[: len(SPECIALS)].sum() == 0
    assert trained.token_bytes[ids].sum() == len(UNSEEN[0].encode())


def test_training_is_deterministic_and_full(trained):
    assert trained.vocab_size == 1500
    assert train_tokenizer([*TEXTS, HINDI], 1500).sha256 == trained.sha256
    assert train_tokenizer(TEXTS, 1499).sha256 != trained.sha256


def test_a_small_text_gives_fewer_tokens():
    assert train_tokenizer(["abcd"], 5000).vocab_size < SMALLEST + 5
    with pytest.raises(UserError, match="at least 261"):
        train_tokenizer(["abcd"], 260)


def test_saved_and_loaded_it_is_the_same(trained, tmp_path):
    path = tmp_path / "new" / "tokenizer.json"
    trained.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.sha256 == trained.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded.encode(UNSEEN[0]) == trained.encode(UNSEEN[0])
    lines = (path.parent / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1500 and lines[0] == f"0\t{END_OF_TEXT}"
    assert sorted(found.name for found in path.parent.iterdir()) == ["tokenizer.json", "vocab.txt"]


def test_it_loads_in_transformers_with_the_same_ids(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    trained.save(tmp_path / "tokenizer.json")
    other = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in UNSEEN:
        assert other.encode(text) == trained.encode(text)
    assert other.convert_tokens_to_ids(list(SPECIALS)) == list(range(len(SPECIALS)))


def test_an_id_beyond_the_vocabulary_is_refused(trained):
    for rank in (1500, -1):
        with pytest.raises(UserError, match=f"token {rank} is beyond the vocabulary of 1,500"):
            trained.decode([rank])


def _broken(layout, change):
    change(layout)
    return json.dumps(layout)


@pytest.mark.parametrize(
    "change",
    [
        lambda layout: layout["model"].update(type="WordPiece"),
        lambda layout: layout.update(pre_tokenizer={"type": "Whitespace"}),
        lambda layout: layout.update(pre_tokenizer=None),
        lambda layout: layout["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        lambda layout: layout["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\S+|\s+"),
        lambda layout: layout["pre_tokenizer"]["pretokenizers"].pop(0),
        lambda layout: layout.update(normalizer={"type": "NFC"}),
        lambda layout: layout["model"]["merges"].reverse(),
        lambda layout: layout["model"]["merges"].pop(),
        lambda layout: layout["model"]["vocab"].pop("a"),
        lambda layout: layout["model"]["vocab"].update(a=99_999),
        lambda layout: layout["added_tokens"].clear(),
        lambda layout: layout.pop("model"),
    ],
)
def test_another_kind_of_tokenizer_is_one_clear_line(trained, tmp_path, change):
    path = tmp_path / "tokenizer.json"
    trained.save(path)
    path.write_text(_broken(json.loads(path.read_text(encoding="utf-8")), change), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        Tokenizer.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_damaged_files_are_one_clear_line(tmp_path):
    for name, content in {"cut.json": b'{"model": {', "list.json": b"[]", "binary.json": b"\xff\xfe\x00"}.items():
        (tmp_path / name).write_bytes(content)
    for name in ("missing.json", "cut.json", "list.json", "binary.json"):
        with pytest.raises(UserError, match=name):
            Tokenizer.load(tmp_path / name)


def test_the_readable_list_does_not_take_the_place_of_the_tokenizer(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("khanhllm.data.prepare.train_on", None)
    assert cli.main(["tokenizer", "--data", "stdlib", "--out", str(tmp_path / "vocab.txt")]) == 2
    assert "vocab.txt: the readable list beside the tokenizer has this name" in capsys.readouterr().err


def test_torch_is_not_imported():
    code = "import sys, khanhllm.data.tokenizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from khanhllm.data.tokenizer import SPECIALS, Tokenizer
from khanhllm.inference.words import Words, spoken

VIETNAMESE = "Khánh kể chuyện cổ tích 🏯 cho trẻ \ufffd em"


@pytest.fixture(scope="module")
def bytes_only(pytestconfig) -> Tokenizer:
    """Each byte of a text is a token, so that most characters span several."""
    return Tokenizer.load(pytestconfig.rootpath / "tests" / "golden" / "modern" / "tokenizer.json")


def split(tokenizer, text):
    return [token for byte in text.encode() for token in tokenizer.encode_bytes(bytes([byte]))]


def test_characters_across_tokens_come_whole(bytes_only):
    """Also one that looks like the mark of a broken character."""
    pieces = list(spoken(bytes_only, split(bytes_only, VIETNAMESE)))
    assert "".join(pieces) == VIETNAMESE
    assert len(pieces) == len(VIETNAMESE)


def test_a_stop_across_characters_across_tokens(bytes_only):
    assert "".join(spoken(bytes_only, split(bytes_only, VIETNAMESE), ["tích 🏯"])) == "Khánh kể chuyện cổ "
    words = Words(bytes_only, ["🏯 cho"])
    shown = [words.add(token) for token in split(bytes_only, "a 🏯 ch")]
    assert "".join(shown) == "a " and not words.ended
    assert words.rest() == "🏯 ch"


def test_half_a_character_at_the_end_is_marked(bytes_only):
    assert "".join(spoken(bytes_only, split(bytes_only, "a🏯")[:-1])) == "a\ufffd"


@pytest.mark.parametrize("name", SPECIALS)
def test_a_special_token_ends_a_text(bytes_only, name):
    """By its name in a text it would be taken for letters."""
    tokens = [*split(bytes_only, "ab"), bytes_only.specials[name], *split(bytes_only, "c")]
    assert "".join(spoken(bytes_only, tokens)) == "ab"


@given(st.lists(st.text("ab", max_size=4), max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_a_stop_is_honoured_across_pieces_and_never_half_shown(pieces, stops):
    """Where the text is cut does not depend on its pieces: before the stop that is complete first."""
    shown, text = "", "".join(pieces)
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    whole = text[: min(ends)[1]] if ends else text
    words = Words(SimpleNamespace(decode_bytes=lambda tokens: "".join(tokens).encode()), stops)  # a piece is a token
    for piece in pieces:
        shown += words.add(piece)
        assert whole.startswith(shown)
        if words.ended:
            break
    assert words.ended == bool(ends)
    assert shown + words.rest() == whole

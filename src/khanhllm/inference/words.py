"""Text out of tokens, as they come: characters that span tokens, and texts that end it."""

import codecs
from collections.abc import Collection, Iterable, Iterator, Sequence

from khanhllm.data.tokenizer import Tokenizer


class Words:
    """Takes pieces of text and gives back what can be shown: up to the first text of `stops` that is complete, without
    it. A stop may lie across several pieces; what may be its beginning is held back until the next pieces decide.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.stops = stops
        self.ended = False
        """whether a stop has come; nothing follows"""
        self._held = ""

    def add(self, piece: str) -> str:
        """What can be shown now."""
        held = self._held + piece
        found = [(at + len(stop), at) for stop in self.stops if (at := held.find(stop)) >= 0]
        if found:
            self.ended, self._held = True, ""
            return held[: min(found)[1]]
        keep = max((size for stop in self.stops for size in range(len(stop)) if held.endswith(stop[:size])), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def rest(self) -> str:
        """What was held back, since nothing follows."""
        rest, self._held = self._held, ""
        return rest


class TokenWords:
    """`Words` for tokens. A character may span several tokens too; bytes that are none become U+FFFD."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.words = tokenizer, Words(stops)
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    @property
    def ended(self) -> bool:
        """Whether a stop has come; nothing follows."""
        return self.words.ended

    def add(self, token: int) -> str:
        """What can be shown now."""
        return self.words.add(self.decoder.decode(self.tokenizer.decode_bytes([token])))

    def rest(self) -> str:
        """What was held back, since nothing follows."""
        last = "" if self.ended else self.decoder.decode(b"", final=True)
        return self.words.add(last) + self.words.rest()


def spoken(
    tokenizer: Tokenizer, tokens: Iterable[int], stops: Sequence[str] = (), ends: Collection[int] = ()
) -> Iterator[str]:
    """The text of tokens piece by piece, up to the first of `stops` or of the tokens `ends`, by default end-of-text."""
    words = TokenWords(tokenizer, stops)
    for token in tokens:
        if token in (ends or (tokenizer.end_of_text,)):
            break
        if piece := words.add(token):
            yield piece
        if words.ended:
            return
    if rest := words.rest():
        yield rest

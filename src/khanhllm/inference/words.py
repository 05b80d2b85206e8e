"""Text out of tokens, as they come: characters that span tokens, and texts that end it."""

import codecs
from collections.abc import Iterable, Iterator, Sequence

from khanhllm.data.tokenizer import Tokenizer


class Words:
    """Takes tokens and gives back the text that can be shown: up to the first of `stops` that is complete, without it.
    A stop may lie across several tokens; what may be its beginning is held back until the next tokens decide. A
    character may span several tokens too; bytes that are none become U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.ended = False
        """whether a stop has come; nothing follows"""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def add(self, token: int) -> str:
        """What can be shown now."""
        return self._shown(self._decoder.decode(self.tokenizer.decode_bytes([token])))

    def _shown(self, piece: str) -> str:
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
        shown = "" if self.ended else self._shown(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return shown + rest


def spoken(tokenizer: Tokenizer, tokens: Iterable[int], stops: Sequence[str] = ()) -> Iterator[str]:
    """The text of tokens piece by piece, up to the first of `stops` or of the tokens that end a text."""
    words = Words(tokenizer, stops)
    for token in tokens:
        if token in tokenizer.ends:
            break
        if piece := words.add(token):
            yield piece
        if words.ended:
            return
    if rest := words.rest():
        yield rest

"""Read plain text: bytes as characters, and a stream of characters as documents.

A file of plain text has no documents of its own. If lines of <|endoftext|> part it, as in files of stories, the
documents lie between them. Any other is cut at blank lines, into enough pieces that even a single novel has some to
hold out. A mark inside a line is text: the line may well speak about it.
"""

import codecs
import re
from collections.abc import Iterator
from itertools import chain

from khanhllm.data.tokenizer import END_OF_TEXT
from khanhllm.errors import UserError

BLOCK = 2**18
"""bytes read at once"""
LONGEST = 2**24
"""longest document between two marks (characters); no book is longer. So as many show whether marks part a file"""
MARK = re.compile(rf"^[^\S\n]*{re.escape(END_OF_TEXT)}[^\S\n]*$\n?", re.MULTILINE)
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def as_utf8(blocks: Iterator[bytes], where: str) -> Iterator[bytes]:
    """The blocks of a file; those of UTF-16 with a byte order mark, as Windows writes it, become UTF-8."""
    first = next(blocks, b"")
    if not first.startswith(UTF_16):
        yield from chain([first], blocks)
        return
    decoder = codecs.getincrementaldecoder("utf-16")()
    try:
        for block in chain([first], blocks, [b""]):
            yield decoder.decode(block, final=not block).encode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where} begins as UTF-16, but is not ({error.reason}); convert it to UTF-8") from None


def decoded(blocks: Iterator[bytes], where: str) -> Iterator[str]:
    """A text file as pieces of text, without the byte order mark that some editors leave."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    start = 0
    for block in chain(as_utf8(blocks, where), [b""]):
        waiting = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            offset = start - waiting + error.start
            raise UserError(f"{where} is not UTF-8 text (byte {offset}); convert it to UTF-8") from None
        if (at := block.find(b"\0")) >= 0:  # as in UTF-16 without a mark and in binary files
            raise UserError(f"{where} holds a NUL byte (byte {start + at}); is it text? Convert it to UTF-8")
        yield text if start else text.removeprefix("\ufeff")
        start += len(block)


def documents(texts: Iterator[str], most: int) -> Iterator[str]:
    """The documents of a stream of text: what lies between marks, else pieces of at most `most` characters."""
    beginning, fault = "", None
    try:
        for text in texts:
            beginning += text
            if len(beginning) >= LONGEST:
                break
    except UserError as error:
        fault = error
    marked = END_OF_TEXT in beginning and MARK.search(beginning)
    found = _between_marks(beginning, texts) if marked else _pieces(chain([beginning], texts), most)
    if not fault:
        yield from found
    else:  # whole documents before the fault come first, as they would without this look ahead
        yield from list(found)[:-1]
        raise fault


def _between_marks(beginning: str, texts: Iterator[str]) -> Iterator[str]:
    pending = beginning
    for text in chain(texts, [""]):
        pending += text
        ended = pending.rfind("\n") + 1 if text else len(pending)  # the last line may be half a mark
        *whole, rest = MARK.split(pending[:ended])
        pending = rest + pending[ended:]
        yield from (document.strip("\r\n") for document in whole if document.strip())
        while len(pending) > LONGEST:
            cut = _cut(pending, LONGEST)
            yield pending[:cut]
            pending = pending[cut:]
    if pending.strip():
        yield pending.strip("\r\n")


def _pieces(texts: Iterator[str], most: int) -> Iterator[str]:
    """Cut a stream of text into documents of at most `most` characters; joined, they are the text again."""
    pending = ""
    for text in texts:
        pending += text
        start = 0
        while len(pending) - start > most:
            end = start + _cut(pending[start : start + most], most)
            yield pending[start:end]
            start = end
        pending = pending[start:]
    yield pending


def _cut(text: str, most: int) -> int:
    """The best place to cut in the second half of the allowed length: a blank line, else a line, else a word."""
    for mark in ("\n\n", "\r\n\r\n", "\n", " "):
        if (at := text.rfind(mark, most // 2, most)) >= 0:
            return at + len(mark)
    return most

"""Read the values of a JSON text one by one."""

import json
from collections.abc import Iterator
from typing import Any

from khanhllm.errors import UserError

LONGEST = 2**27
"""longest value (characters); one that is never closed runs into this limit"""


def values(texts: Iterator[str], where: str) -> Iterator[Any]:
    """The values of a JSON text, with or without brackets around many of them; memory holds one of them."""
    decoder = json.JSONDecoder()
    pending, at, more, number, array = "", 0, True, 1, False

    def fill(least: int) -> None:
        nonlocal pending, at, more
        parts, size = [pending[at:]], 0
        while more and size < least:
            block = next(texts, None)
            more = block is not None
            parts.append(block or "")
            size += len(parts[-1])
        pending, at = "".join(parts), 0

    def mark() -> str:
        """The next character that is not blank, which stays to be read; "" at the end."""
        nonlocal at
        while more or at < len(pending):
            if at == len(pending):
                fill(1)
            elif pending[at].isspace():
                at += 1
            else:
                return pending[at]
        return ""

    while following := mark():
        if following == ("]" if array else "["):  # one array may follow another, as `cat` leaves them
            array, at = not array, at + 1
            continue
        try:
            value, end = decoder.raw_decode(pending, at)
        except RecursionError:
            raise UserError(f"{where}, item {number} is not valid JSON (too deep)") from None
        except ValueError as error:
            if not more or len(pending) - at > LONGEST:
                why = getattr(error, "msg", error)
                raise UserError(
                    f"{where}, item {number} is not valid JSON ({why}); is the file cut in the middle?"
                ) from None
            fill(len(pending) - at)
            continue
        yield value
        at, number = end, number + 1
        if array and mark() == ",":
            at += 1
    if array:
        raise UserError(f"{where} is cut short: the array has no end; copy or download it again")

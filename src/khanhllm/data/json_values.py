"""Read the values of a JSON text one by one."""

import json
from collections.abc import Iterator
from typing import Any

from khanhllm.errors import UserError

LONGEST = 2**27
"""longest value (characters); one that is never closed runs into this limit"""


def values(texts: Iterator[str], where: str) -> Iterator[Any]:
    """The values of a JSON text, with or without brackets around all of them; memory holds one of them."""
    decoder = json.JSONDecoder()
    pending, more, number, array = "", True, 1, False

    def fill(least: int) -> None:
        nonlocal pending, more
        parts, size = [pending], 0
        while more and size < least:
            block = next(texts, None)
            more = block is not None
            parts.append(block or "")
            size += len(parts[-1])
        pending = "".join(parts).lstrip()

    fill(1)
    if pending.startswith("["):
        array, pending = True, pending[1:].lstrip()
    while True:
        while not pending and more:
            fill(1)
        if not pending or (array and pending.startswith("]")):
            break
        try:
            value, end = decoder.raw_decode(pending)
        except RecursionError:
            raise UserError(f"{where}, item {number} is not valid JSON (too deep)") from None
        except ValueError as error:
            if not more or len(pending) > LONGEST:
                why = getattr(error, "msg", error)
                raise UserError(
                    f"{where}, item {number} is not valid JSON ({why}); is the file cut in the middle?"
                ) from None
            fill(len(pending))
            continue
        yield value
        number += 1
        pending = pending[end:].lstrip()
        while not pending and more:
            fill(1)
        pending = pending.removeprefix(",").lstrip() if array else pending
    if array and not pending.startswith("]"):
        raise UserError(f"{where} is cut short: the array has no end; copy or download it again")

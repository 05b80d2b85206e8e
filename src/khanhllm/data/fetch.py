"""Download one file, complete and verified, or not at all.

A download continues where it stopped, after a broken connection or a killed process, if the server confirms (by ETag
or date) that the file is still the same. `fetch` retries whatever fails, after waits that grow and vary, so that many
clients do not come back at once. It gives up when nothing has arrived for as long as `patience`.
"""

import email.utils
import json
import random
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import HTTPError

from khanhllm.errors import UserError
from khanhllm.files import sha256_of

CONNECT, STALL = 10.0, 30.0
"""seconds until a server that does not answer, or stops in the middle, counts as gone"""
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""seconds between two tries, at first and at most"""
BLOCK = 2**16
"""bytes written at once; a broken connection loses the block that has not fully arrived"""
REFUSALS, DAMAGES = 3, 5
"""refusals in a row, and damaged downloads in a row, until `fetch` gives up"""
AGAIN = (408, 425, 429)
"""refusals that ask the client to try again later"""


class _Refused(Exception):
    """The server refused the request."""


class _Unauthorised(_Refused):
    """The server refused this client (401, 403)."""


class NotItsFault(UserError):
    """The file may be good: the network, this disk or the token is at fault."""


class Denied(NotItsFault):
    """The server wants another token."""


class Unreachable(NotItsFault):
    """Nothing arrives."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


class _Damaged(Exception):
    """The download is complete, but its bytes are wrong."""


class _Later(Exception):
    """The server asks the client to try again after `wait` seconds."""

    def __init__(self, why: str, wait: float) -> None:
        super().__init__(why)
        self.wait = wait


def fetch(
    url: str,
    path: Path,
    *,
    sha256: str = "",
    token: str = "",
    patience: float = 600.0,
    check: Callable[[Path], None] | None = None,
    page: bool = True,
) -> Path:
    """Download `url` to `path`, unless it is there already; returns `path`.

    sha256: the hash that the file must have; empty: that which the hub publishes with its large files. token: sent to
    the server of `url`, but to none that it redirects to. patience: seconds without a new byte until `fetch` gives up.
    check: reads the file and raises if it is damaged, a UserError if another try cannot help. page: whether the file
    may be a web page. Raises UserError; its subclasses say why if the file may be good.
    """
    if path.exists():
        return path
    part = path.with_name(f"{path.name}.part")
    counts = {_Refused: 0, _Damaged: 0}
    farthest, progress, wait = _size(part), time.monotonic(), FIRST_WAIT
    while True:
        pause = random.random() * wait
        try:
            published = _download(url, part, token, page)
            _verify(part, sha256 or published, check)
            part.replace(path)
            _validator(part).unlink(missing_ok=True)
            return path
        except (requests.RequestException, HTTPError, _Later, _Refused, _Damaged) as error:
            why = _why(error)
            if isinstance(error, _Damaged):  # all of it had arrived, and is thrown away
                farthest, progress = 0, time.monotonic()
            pause = max(pause, error.wait) if isinstance(error, _Later) else pause
            for kind, most in ((_Refused, REFUSALS), (_Damaged, DAMAGES)):
                counts[kind] = counts[kind] + 1 if isinstance(error, kind) else 0
                if counts[kind] >= most:
                    final = Denied if isinstance(error, _Unauthorised) else UserError
                    raise final(f"{url}: {why}, {most} times in a row") from None
        except OSError as error:
            raise NotItsFault(f"cannot write {path}: {error.strerror or error}", 75) from None
        if _size(part) > farthest:
            farthest, progress, wait = _size(part), time.monotonic(), FIRST_WAIT
        if time.monotonic() + pause - progress > patience:
            host = urlsplit(url).hostname
            raise Unreachable(f"no network for {patience:g} s: {host} sends nothing ({why}) for {url}")
        time.sleep(pause)
        wait = min(2 * wait, LONGEST_WAIT)


def _why(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    causes = {"NameResolution": "its name is not known", "refused": "connection refused", "timed out": "no answer"}
    return next((cause for mark, cause in causes.items() if mark in text), text.splitlines()[0][:120])


def _download(url: str, part: Path, token: str, page: bool) -> str:
    """Complete `part`, or raise. Returns the sha256 that the server publishes for it, or ""."""
    have, validator = _size(part), _saved_version(part)
    headers = {"User-Agent": "khanhllm", "Accept-Encoding": "identity"}
    if token:
        headers["Authorization"] = f"Bearer {token}"  # requests leaves it out where a redirect leads to another host
    if have and validator:
        headers |= {"Range": f"bytes={have}-", "If-Range": validator}
    with requests.get(url, headers=headers, stream=True, timeout=(CONNECT, STALL)) as answer:
        start, total = _span(answer, have, part)
        published = _published(answer)
        if not page and answer.headers.get("Content-Type", "").partition(";")[0].strip().lower() == "text/html":
            _forget(part)
            raise UserError(f"{url} is a web page (text/html), not a file of text; give the address of the text itself")
        if not start:
            _forget(part)
            _validator(part).write_text(json.dumps(_version(answer)), encoding="utf-8")
        with part.open("ab") as file:
            for block in answer.raw.stream(BLOCK, decode_content=False):  # as stored: Content-Length counts these
                file.write(block)
    size = _size(part)
    if total is not None and size < total:
        raise requests.ConnectionError(f"only {size:,} of {total:,} bytes arrived")
    if total is not None and size > total:
        _forget(part)
        raise _Damaged(f"{size:,} bytes arrived instead of {total:,}")
    return published


def _published(answer: requests.Response) -> str:
    """The sha256 that the hub sends when it redirects to a large file; "" if there is none."""
    tags = (step.headers.get("X-Linked-Etag", "").strip('"').lower() for step in (*answer.history, answer))
    return next((tag for tag in tags if re.fullmatch(r"[0-9a-f]{64}", tag)), "")


def _span(answer: requests.Response, have: int, part: Path) -> tuple[int, int | None]:
    """Where the body of an answer starts in the file, and how long the file is, if the server says so."""
    code = answer.status_code
    if code == 206:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        if span and int(span[1]) == have:
            return have, int(span[2])
    if code == 200:
        length = answer.headers.get("Content-Length")
        return 0, int(length) if length and length.isdigit() else None
    if code in (206, 416):
        _forget(part)
        raise requests.ConnectionError("the server sent something other than the rest of the file")
    if code in AGAIN or code >= 500:
        raise _Later(f"answer {code} {answer.reason}", min(_retry_after(answer), 2 * LONGEST_WAIT))
    raise (_Unauthorised if code in (401, 403) else _Refused)(f"answer {code} {answer.reason}")


def _retry_after(answer: requests.Response) -> float:
    """The wait that the server asks for, as a number or a date (seconds); 0 if it names none."""
    value = answer.headers.get("Retry-After", "")
    if value.isdigit():
        return float(value)
    with suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0


def _version(answer: requests.Response) -> str:
    """The ETag or date that identifies this version of the file; a weak ETag does not."""
    tag = answer.headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified", "")


def _saved_version(part: Path) -> str:
    try:
        return str(json.loads(_validator(part).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return ""


def _validator(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _validator(part).unlink(missing_ok=True)


def _verify(part: Path, sha256: str, check: Callable[[Path], None] | None) -> None:
    try:
        if sha256 and sha256_of(part) != sha256:
            raise _Damaged("its sha256 is not the published one")
        if check:
            check(part)
    except UserError:
        _forget(part)
        raise
    except Exception as error:
        _forget(part)
        raise _Damaged(f"wrong bytes arrived ({_why(error)})") from None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0

"""Find the files of a source string.

Files are ordered by a hash of their names, so any prefix of the list is a fair sample of the whole: a run that needs
little of a large source reads little of it, and the tokenizer's sample is the beginning of the list. Nothing here
opens a file, except a .json, to see whether it holds documents. A remote server gets one request with a short timeout,
so that a missing network shows within seconds.
"""

import glob
import math
import os
import re
import stat
import sysconfig
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from http.client import InvalidURL
from itertools import chain
from pathlib import Path
from threading import Thread
from typing import Literal
from urllib.parse import urlsplit

from khanhllm.data.source_syntax import common_folder, expanded, of_split, with_home, with_split
from khanhllm.data.walk import KINDS, ending, kind, matching, once, readable, walk
from khanhllm.data.warc import can_read_pages
from khanhllm.errors import UserError, first_line
from khanhllm.explain import did_you_mean
from khanhllm.files import there

PACKED = (".gz", ".zst", ".parquet")
ALLOWED = f"known endings: {' '.join(chain.from_iterable(KINDS.values()))}"
LOCAL_HELP = "use text that is here: --data stdlib, or a file, or a folder"
LOGIN = "if the dataset is private or gated, type `hf auth login` or set HF_TOKEN, and accept its terms on its page"

C4 = "hf://datasets/allenai/c4/en"
C4_FILES = (("train", 1024), ("validation", 8))
COMMA = re.compile(r",(?![^{}]*\})")
"""between the parts of a mixture; a comma inside braces is part of an address"""
MOST_KINDS = 10
"""of what is left out that are named"""
PATIENCE = 5.0
"""seconds to wait for a server's first answer"""


@dataclass(frozen=True)
class Source:
    """The files that a source string stands for."""

    name: str
    root: str
    """folder or URL that all files lie under"""
    files: tuple[str, ...]
    """names relative to root, in reading order"""
    text_bytes: tuple[int, ...]
    """about how much text each file holds (bytes); 0 where unknown"""
    fingerprint: str
    """changes when a local file does"""
    document_bytes: int
    """about how long the pieces of a text file are (characters)"""
    column: str = ""
    """column of the text in json lines and tables; empty means the first usual name that is there"""
    validation: tuple[str, ...] = ()
    """files of the source's own validation split; without one, documents are held out by a hash of their text"""
    bad: Literal["refuse", "skip"] = "refuse"
    """what to do with files that cannot be read"""
    laid_for: int = 0
    """above 0: it holds conversations, which are packed into rows of so many tokens"""
    left_out: tuple[tuple[str, int], ...] = ()
    """what a folder or pattern also holds, but is not read: its kind, and how often; decides nothing"""

    def left_out_line(self) -> str:
        """What is left out, as one line; "" if it is nothing."""
        return f"left out of {self.name}: {in_words(self.left_out)}" if self.left_out else ""

    @property
    def size(self) -> int:
        """About how much text there is (bytes); 0 if unknown."""
        return sum(self.text_bytes)

    def groups(self, least: int = 2**23) -> list[tuple[str, ...]]:
        """Neighbouring files of about equal total size: the tasks of the pipeline, decided by the source alone."""
        most = max(least, self.size // 256)
        groups: list[list[str]] = []
        room = 0
        for name, size in zip(self.files, self.text_bytes, strict=True):
            if room <= 0:
                groups.append([])
                room = most
            groups[-1].append(name)
            room -= size or most
        return [tuple(group) for group in groups]


def in_words(kinds: Iterable[tuple[str, int]]) -> str:
    """How many there are of each kind, the most frequent first."""
    ordered = sorted(kinds, key=lambda item: (-item[1], item[0]))
    parts = [f"{number:,} {what}" for what, number in ordered[:MOST_KINDS]]
    rest = sum(number for _, number in ordered[MOST_KINDS:])
    return ", ".join(parts + [f"{rest:,} of other kinds"] * bool(rest))


def components(source: str) -> list[tuple[str, float]]:
    """The sources of a mixture `one:0.8, other:0.2` and their shares, which sum to 1.

    A string is a mixture if it has two or more parts and each ends in a weight, unless a path of that name exists.
    """
    weight = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
    parts = [re.fullmatch(rf"(.*\S)\s*:\s*({weight})", part.strip(), re.DOTALL) for part in COMMA.split(source)]
    weighted = [(part[1], float(part[2])) for part in parts if part]
    if len(parts) == 1 or len(weighted) < len(parts) or there(with_home(source)):
        return [(source, 1.0)]
    names = [name for name, _ in weighted]
    for name, share in weighted:
        if not 0 < share < math.inf:
            raise UserError(f"the weight of {name} in the mixture must be above 0 and finite, got {share:g}")
        if names.count(name) > 1:
            raise UserError(f"{name} is in the mixture twice; name it once, with the sum of the weights")
    largest = max(share for _, share in weighted)
    total = math.fsum(share / largest for _, share in weighted)
    return [(name, share / largest / total) for name, share in weighted]


def with_column(source: str) -> tuple[str, str]:
    """Split `source#column` in two; the column is "" if there is none, or if a path of that whole name exists."""
    place, mark, column = source.rpartition("#")
    if not mark or "/" in column or _exists(source):
        return source, ""
    if not place or not column:
        raise UserError(f"{source} names no column; write it behind the '#', as in my.csv#body")
    return place, column


def _exists(source: str) -> bool:
    path = with_home(source)
    return path.exists() or any(True for _ in matching(path))


def anchored(source: str) -> str:
    """The source with absolute paths, so that it means the same wherever it is read."""
    if len(components(source)) > 1:
        parts = [part.strip().rpartition(":") for part in COMMA.split(source)]
        return ", ".join(f"{anchored(name.strip())}:{weight}" for name, _, weight in parts)
    place, column = with_column(source)
    if place in ("stdlib", "c4", "") or "://" in place:
        return source
    path, here = with_home(place), str(Path.cwd())
    if "," in here:  # it would part the names of a mixture
        return source
    pattern = glob.has_magic(place) and not there(path)
    absolute = Path(glob.escape(here) if pattern else here, path)
    return f"{absolute}#{column}" if column else str(absolute)


def is_remote(source: str) -> bool:
    """Whether any part of a source comes over the network."""
    remote = ("hf://", "http://", "https://")
    return any(with_column(name)[0] == "c4" or name.startswith(remote) for name, _ in components(source))


def locate(source: str, bad: Literal["refuse", "skip"] = "refuse") -> Source:
    """Find the files of a source. bad: what its readers do with those that cannot be read.

    Raises UserError if there are none or, within seconds, if the network is missing.
    """
    if not source.strip():
        raise UserError("the source of text is empty; name a file, a folder or an address (data.source)")
    parts = components(source)
    if len(parts) > 1:
        raise UserError(
            f"{source} is a mixture; look at its sources one by one: {', '.join(name for name, _ in parts)}"
        )
    place, column = with_column(source)
    located = replace(_without_column(place, column, bad), bad=bad)
    if not column:
        return located
    if all(kind(name, located.root) in ("text", "page") for name in located.files):
        raise UserError(f"{place} is plain text, which has no column '{column}'; leave out #{column}")
    return replace(located, name=source, column=column, fingerprint=f"{located.fingerprint}#{column}")


def _without_column(source: str, column: str, bad: str) -> Source:
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [path for path in walk(root, Counter(), links=False) if path.suffix in (".py", ".txt", ".rst")]
        return _local(source, root, files, Counter(), "refuse")
    if source == "c4":
        _ask(_hub(), source)
        names, held = (
            [f"c4-{split}.{number:05d}-of-{files:05d}.json.gz" for number in range(files)] for split, files in C4_FILES
        )
        return replace(_remote(source, C4, names), validation=tuple(held))
    if source.startswith("hf://"):
        if not re.match("hf://datasets/[^/@]+/[^/@]+(/|$)", source):
            raise UserError(f"{source} names no dataset; write hf://datasets/ORG/NAME, without @REVISION")
        _ask(_hub(), source)
        folder, names, left_out = _listed(source)
        return _remote(source, folder, names, left_out=left_out)
    if source.startswith(("http://", "https://")):
        urls = expanded(source)
        size = _ask(urls[0], source, must_exist=True)  # one request: the others should exist and be as large
        folder, names = common_folder(urls)
        return _remote(source, folder, [_known(name, source) for name in names], size)
    if "://" in source:
        raise UserError(f"unknown source {source}; it may be stdlib, c4, hf://datasets/..., http(s)://... or a path")
    try:
        return _on_disk(source, column, bad)
    except OSError as error:  # a name too long, or a folder without permission
        raise UserError(f"cannot read {source}: {error.strerror}") from None


def _on_disk(source: str, column: str, bad: str) -> Source:
    left_out = Counter[str]()
    path = with_home(source)
    if path.is_dir():
        if (path / "config.toml").exists() and (path / "training_log.csv").exists():
            raise UserError(f"{path} is a run, which holds no text; name its source (data.source in its config.toml)")
        if (path / "manifest.json").exists():
            what = f"{path} has a manifest.json, as prepared shards have; give the text they were made from"
            raise UserError(f"{what}, or if it holds texts itself, a pattern: '{path}/**'")
        files = readable(walk(path, left_out), column, left_out)
        if not files:
            what = f"; it holds {in_words(left_out.items())}" if left_out else ""
            raise UserError(f"the folder {path} holds no text files; {ALLOWED}{what}")
        return _local(source, path, files, left_out, bad)
    if path.is_file():
        if kind(path.name) == "page" and not can_read_pages():
            raise UserError(f"to read {source}, install Resiliparse: pip install 'khanhllm[web]'")
        return _local(source, path.parent, [path.with_name(_known(path.name, source))], Counter(), bad)
    if glob.has_magic(source):
        matched = once(file for file in matching(path) if file.is_file())
        files = readable(matched, column, left_out)
        if not files:
            why = (
                f"only files of unknown kind; {ALLOWED}; these are {in_words(left_out.items())}"
                if matched
                else "nothing"
            )
            raise UserError(f"the pattern {source} matches {why}")
        return _local(source, Path(os.path.commonpath([file.parent for file in files])), files, left_out, bad)
    guess = did_you_mean(source, ["stdlib", "c4"])
    raise UserError(f"there is no file, folder or source named {source}{guess}; {LOCAL_HELP}")


def _known(name: str, source: str) -> str:
    if not kind(name, source):
        raise UserError(f"{source} is of unknown kind; {ALLOWED}")
    return name


def _shuffled(names: list[str]) -> list[str]:
    return sorted(names, key=lambda name: blake2b(name.encode("utf-8", "surrogateescape")).digest())


def _local(source: str, root: Path, paths: list[Path], left_out: Counter[str], bad: str) -> Source:
    stats = {}
    for path in paths:
        try:
            stats[path.relative_to(root).as_posix()] = _stat(path)
        except UserError:
            if bad == "refuse" or len(paths) == 1:
                raise
            left_out[f"{ending(path.name)} that cannot be read"] += 1
    if not stats:
        raise UserError(f"{source}: none of its {len(paths)} files can be read; it holds {in_words(left_out.items())}")
    files = _shuffled(list(stats))
    listing = [(name, stats[name].st_size, stats[name].st_mtime_ns) for name in files]
    sizes = tuple(max(size, 1) * (4 if name.lower().endswith(PACKED) else 1) for name, size, _ in listing)
    fingerprint = blake2b(repr((str(root.resolve()), listing)).encode("utf-8", "surrogateescape")).hexdigest()
    most, counts = _document_bytes(sum(sizes)), tuple(left_out.items())
    return Source(source, str(root.resolve()), tuple(files), sizes, fingerprint, most, left_out=counts)


def _stat(path: Path) -> os.stat_result:
    """The status of a file. Raises UserError for a broken link, for a pipe or device, which may never end, and for a
    packed file without a byte."""
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; remove it or repair the link") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"cannot read {path}: it is not a regular file; remove it or give another folder")
    if not status.st_size and path.name.lower().endswith(PACKED):
        raise UserError(f"{path} is empty (0 bytes); copy or download it again")
    return status


def _remote(
    source: str, root: str, names: list[str], size: int = 0, left_out: tuple[tuple[str, int], ...] = ()
) -> Source:
    sizes = (size,) * len(names)
    return Source(
        source, root, tuple(_shuffled(names)), sizes, source, _document_bytes(size or 2**22), left_out=left_out
    )


def _document_bytes(total: int) -> int:
    """Where text files are cut: small enough for a few dozen documents, large enough to keep most files whole."""
    return min(max(total // 64, 2**11), 2**20)


def _listed(source: str) -> tuple[str, list[str], tuple[tuple[str, int], ...]]:
    """Root and file names of a file, folder or pattern on the hub, and what is left out of it.

    A .json or .html file may be anything, so it is taken only where the source names this ending.
    """
    from huggingface_hub import HfFileSystem
    from huggingface_hub.errors import HfHubHTTPError

    hub = HfFileSystem()
    path, split = with_split(source.removeprefix("hf://").rstrip("/"))
    path = path.rstrip("/")
    with as_user_error(source):
        try:
            single = glob.has_magic(path) is False and hub.isfile(path)  # type: ignore[no-untyped-call]
            names = [path] if single else list(hub.glob(path) if glob.has_magic(path) else hub.find(path))
        except FileNotFoundError:  # the hub answers so for private datasets too
            raise UserError(f"the hub has no {source}; {LOGIN}") from None
        except HfHubHTTPError as error:
            if error.response.status_code not in (401, 403):
                raise
            raise UserError(f"{source}: the hub answers {error.response.status_code}; {LOGIN}") from None
    taken = [str(name) for name in names if kind(str(name))]
    files = [name for name in taken if kind(name) not in ("json", "page") or path.endswith(ending(name))]
    left_out = Counter(ending(Path(str(name)).name) for name in names if str(name) not in files)
    if not files:
        raise UserError(f"{source} holds no text files that exist and can be read; {ALLOWED}")
    if split or not single:
        chosen = _chosen(files, split, source)
        left_out.update(["of other splits"] * (len(files) - len(chosen)))
        files = chosen
    root, relative = common_folder(files)
    return f"hf://{root}", relative, tuple(left_out.items())


def _chosen(files: list[str], split: str, source: str) -> list[str]:
    """The files of one repository that belong to a split; the repository's own name does not count."""
    inside = {"/".join(name.split("/")[3:]): name for name in files}
    return [inside[name] for name in of_split(list(inside), split, source)]


def _hub() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _ask(url: str, source: str, must_exist: bool = False) -> int:
    """Send a server one request, before libraries retry it for minutes. Returns the answer's length (bytes) or 0.

    In a thread, because looking up a host name has no timeout of its own.
    """
    try:
        host = urlsplit(url).hostname
    except ValueError as error:
        raise UserError(f"{url} is not an address: {error}") from None
    answer: list[int | Exception] = []

    def ask() -> None:
        request = urllib.request.Request(url, headers={"User-Agent": "khanhllm"})
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                answer.append(int(response.headers.get("Content-Length") or 0))
        except Exception as error:  # the caller's thread reports it, whatever it is
            answer.append(error)

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    reply = answer[0] if answer else TimeoutError("no answer")
    if isinstance(reply, urllib.error.HTTPError):
        if must_exist:
            raise UserError(f"{host} answers {reply.code} {reply.reason} to {url}")
        return 0
    if isinstance(reply, InvalidURL):
        raise UserError(f"{url} is not an address: {reply}")
    if isinstance(reply, Exception):
        why = getattr(reply, "reason", reply)
        raise UserError(f"no network for {source}: {host} does not answer ({why}); {LOCAL_HELP}")
    return reply


@contextmanager
def as_user_error(where: str) -> Iterator[None]:
    """Turn what a library raises into a UserError that names `where`."""
    try:
        yield
    except UserError:
        raise
    except EOFError:
        raise UserError(f"{where} is cut short: its end is missing; copy or download it again") from None
    except Exception as error:
        why = first_line(error)
        raise UserError(f"cannot read {where}: {why}; if it is damaged, copy or download it again") from None

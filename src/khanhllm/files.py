"""Read and publish files. `read` takes only regular files of a sane size, since others may have made them; what
`publish` writes appears whole or not at all."""

import errno
import hashlib
import os
import shlex
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from khanhllm.errors import UserError

SMALL = 2**26
"""larger than any file of settings, notes or vocabulary (bytes)"""

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""what a file system answers that has no locks, as NFS without its lock service"""


def read(path: Path, most: int = SMALL) -> bytes:
    """The bytes of a file. Raises OSError for a pipe or device, which may never end, and for more than `most` bytes."""
    with open(path, "rb", opener=_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        if status.st_size > most:
            raise OSError(errno.EFBIG, f"it has {status.st_size:,} bytes, more than {most:,}", str(path))
        return file.read(most)


def _at_once(path: str, flags: int) -> int:
    """Open without waiting: a pipe would wait for a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def check_writable(*paths: Path) -> None:
    """Raise UserError now if a file cannot be written, rather than after long work."""
    for path in paths:
        try:
            with suppress(FileNotFoundError):
                if not stat.S_ISREG(path.stat().st_mode):
                    raise OSError(errno.EINVAL, "it is not a regular file", str(path))
            folder = next(parent for parent in path.absolute().parents if parent.exists())
            if not folder.is_dir() or not os.access(folder, os.W_OK):
                raise OSError(errno.EACCES, f"{folder} is no folder that can be written", str(path))
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None


def signed(process: int | None = None) -> str:
    """A name for this process, or another of this machine, that none has on other machines which share a folder."""
    return f"{process or os.getpid()}@{socket.gethostname()}"


def publish(path: Path, content: str | bytes, durable: bool = False) -> None:
    """Write aside and rename, so that `path` holds the old content or the new, never half of it. Raises OSError.

    durable: force it to disk before the rename.
    """
    aside = path.with_name(f".{path.name}.{signed()}")
    try:
        with aside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Force a file, or the names in a directory, to disk."""
    if os.name == "nt" and path.is_dir():  # Windows has no handle for this and orders renames itself
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Within this context no other process holds the lock `path`; the system frees it however the process ends.

    If another holds it: calls `waiting` and waits, or without it raises Timeout. Raises OSError. Where the file system
    has no locks, a file beside it stands for the lock; if its process was killed on another machine, it stays, so
    then this raises a UserError that says what to do, instead of waiting.
    """
    lock: BaseFileLock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not waiting:
                raise
            waiting()
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in NO_LOCKS:
            raise
        mark = path.with_name(f"{path.name}.held")
        lock = SoftFileLock(mark)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            why = "this file system has no locks, so if no process works there, on any machine, remove that file"
            raise UserError(f"{path.parent} is in use, as {mark} says; {why}") from None
    try:
        yield
    finally:
        lock.release()


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def there(path: Path) -> bool:
    """Whether a file or folder of this name exists; False for names that none can have."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def quoted(path: Path | str) -> str:
    """A path as a shell takes it, for a command that is proposed."""
    if sys.platform == "win32":
        from subprocess import list2cmdline  # which no start of a command should wait for

        return list2cmdline([str(path)])
    return shlex.quote(str(path))


def check_new(folder: Path) -> None:
    """Raise UserError unless there is no such folder or it is empty, so that what is written there replaces nothing."""
    if there(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already and is no empty folder; choose a new one")


def _user() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0  # Windows: every st_uid is 0


def foreign(folder: Path, elsewhere: str = "") -> str:
    """One line about a link, pipe or device in a folder, however deep; empty if there is none.

    Reading or writing through a link would leave the folder; through a pipe or device it might never end. elsewhere:
    the name of a folder in it that may lie on another disk: a link to a folder of the same user is then no fault, but
    what lies there may be one.
    """
    link = folder / elsewhere
    if elsewhere and link.is_symlink() and link.is_dir() and link.stat().st_uid == link.lstat().st_uid == _user():
        if fault := foreign(link):
            return fault
    else:
        elsewhere = ""
    for root, folders, names in os.walk(folder):
        for path in (Path(root, name) for name in sorted(folders + names)):
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:  # a training that runs here has just removed it
                continue
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode) and (not elsewhere or path != link):
                return f"{path} is {'a link' if stat.S_ISLNK(mode) else 'not a regular file'}"
    return ""

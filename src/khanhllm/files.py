"""How files are read and published. What somebody may have sent is read only if it is a file of a sane size; what we
write appears whole or not at all."""

import errno
import os
import stat
from pathlib import Path

SMALL = 2**26
"""more than any file of settings, notes or vocabulary has (bytes)"""


def read(path: Path, most: int = SMALL) -> bytes:
    """The bytes of a file. OSError for a pipe or a device, which may never end, and for more than `most` bytes."""
    with open(path, "rb", opener=_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        if status.st_size > most:
            raise OSError(errno.EFBIG, f"it has {status.st_size:,} bytes, more than {most:,}", str(path))
        return file.read(most)


def _at_once(path: str, flags: int) -> int:
    """A pipe would wait for somebody to write into it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def publish(path: Path, content: str | bytes, durable: bool = False) -> None:
    """Write aside and rename, so that `path` holds the old content or the new, never half of it. Raises OSError.

    durable: force it to disk before the rename.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
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


def there(path: Path) -> bool:
    """Whether anything has this name; False for names that no file can have."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def foreign(folder: Path) -> str:
    """One line about a link, pipe or device in a folder, however deep; empty if there is none.

    What is read or written through it would lie elsewhere, or never end.
    """
    for root, folders, names in os.walk(folder):
        for path in (Path(root, name) for name in sorted(folders + names)):
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:  # of a training that is at work here
                continue
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                return f"{path} is {'a link' if stat.S_ISLNK(mode) else 'no regular file'}"
    return ""

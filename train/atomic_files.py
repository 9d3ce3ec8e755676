"""Files that are complete or absent after any kill, and folders with one writing process."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.errors import UserError

_CLAIMS: list[int] = []
"""Open lock files; they stay locked until this process ends."""
_WRITE_FAULTS = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)
)
"""Disk or quota full, read-only, not permitted, file size limit."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to write errors: those of an open file (disk full) have no name, and those of a
    copy have the name of the file that was read first."""
    try:
        yield
    except OSError as error:
        place = str(path) if error.filename is None else error.filename
        if error.errno in _WRITE_FAULTS and error.filename2 is not None:
            place = error.filename2
        raise OSError(error.errno, error.strerror or str(error), place) from None


def write_fault(error: BaseException | None) -> OSError | None:
    """The error, among an error and its causes, of a disk that is full or not writable."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _WRITE_FAULTS:
            return error
        error = error.__cause__ or error.__context__
    return None


def sync(path: Path) -> None:
    """Make a file or folder durable: its content survives a power failure."""
    with naming(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def replace_text(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader reads the old or the new content, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        raw = text.encode()
    except UnicodeEncodeError as error:
        near = text[max(error.start - 40, 0) : error.end + 40]
        raise UserError(f"{path}: cannot hold {near!r}: it is not UTF-8; rename it") from None
    with naming(path):
        partial.write_bytes(raw)
    sync(partial)
    partial.rename(path)


def set_aside(path: Path) -> str:
    """Rename an unusable file or folder, so that it is kept; returns a message about it."""
    aside = path.with_name(f"{path.name}.damaged")
    number = 1
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    path.rename(aside)
    return f"{path}: damaged, renamed to {aside.name}"


def claim(folder: Path) -> None:
    """Create `folder` and lock it for this process until it ends. Raises UserError if it is
    locked."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"{folder}: another process is training in this folder") from None
    except OSError as error:  # some network file systems have no locks
        os.close(handle)
        raise UserError(f"{folder / '.lock'}: cannot be locked: {error.strerror}") from None
    _CLAIMS.append(handle)

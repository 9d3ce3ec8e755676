"""Files that are whole or absent, whatever kills the process, and folders with one owner."""

import fcntl
import os
from pathlib import Path

from configs.rules import ConfigError

_CLAIMS: list[int] = []
"""Open lock files; they stay locked as long as this process lives."""


def sync(path: Path) -> None:
    """Make a file or folder durable: what it holds survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old content or the new, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, "utf-8")
    sync(partial)
    partial.rename(path)


def set_aside(path: Path) -> str:
    """Rename what cannot be used as it should, so that it is kept; says so."""
    aside = path.with_name(f"{path.name}.damaged")
    number = 1
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    path.rename(aside)
    return f"{path}: damaged, renamed to {aside.name}"


def claim(folder: Path) -> None:
    """Make `folder` and be its only writer until this process ends; ConfigError if another is."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ConfigError(f"{folder}: another process is training in this run.dir") from None
    _CLAIMS.append(handle)

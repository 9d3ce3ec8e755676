"""Files that are whole or absent, whatever kills the process."""

import os
from pathlib import Path


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

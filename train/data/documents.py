"""Stores the documents of a source on disk while a corpus is built, since they may exceed memory.

They are concatenated, as UTF-8, in an unnamed file, which disappears with the process. Reading them
in the order of their hash is then one seek per document for every source: from a Parquet file each
read would decode a whole row group, and a compressed file would be read from its start.
"""

import os
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

_MOST_LISTED = 1000


class Documents:
    """Documents by position, and skipped files and rows. A context manager: closing frees the
    disk."""

    def __init__(self, folder: Path | None) -> None:
        """folder: the file system of the unnamed file; None: that of temporary files."""
        self._file = tempfile.TemporaryFile(dir=folder)
        self._ends = array("q")  # bytes
        self.not_utf8: list[str] = []
        """Files left out because they are not UTF-8."""
        self.unreadable_rows: list[str] = []
        """Rows left out with their reason, the first _MOST_LISTED of them."""
        self.n_unreadable_rows = 0
        self.notes: list[str] = []
        """Other messages for the user, in sentences."""

    def add(self, text: str) -> None:
        """Append a document. Raises UnicodeEncodeError if it contains an unpaired surrogate."""
        raw = text.encode()
        self._file.write(raw)
        self._ends.append(self._start(len(self)) + len(raw))

    def add_unreadable(self, what: str) -> None:
        """Count a row that is skipped."""
        self.n_unreadable_rows += 1
        if len(self.unreadable_rows) < _MOST_LISTED:
            self.unreadable_rows.append(what)

    def shorten(self, length: int) -> None:
        """Remove the documents from position `length` on."""
        del self._ends[length:]
        self._file.seek(self._start(length))
        self._file.truncate()

    def _start(self, position: int) -> int:
        return self._ends[position - 1] if position else 0

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[str]:
        return map(self._read, range(len(self)))

    def take(self, positions: Sequence[int]) -> list[str]:
        """The documents at `positions`, in that order."""
        return [self._read(position) for position in positions]

    def _read(self, position: int) -> str:
        start = self._start(position)
        if self._file.tell() != start:
            self._file.seek(start)
        return self._file.read(self._ends[position] - start).decode()

    def __enter__(self) -> "Documents":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the disk space."""
        self._file.close()


def shown(name: str | os.PathLike[str], most: int = 1000) -> str:
    """A name as text that any terminal and any UTF-8 file accepts, in one line.

    A file's name is a string of bytes: those that are not UTF-8, and characters that do not print,
    are shown as escapes.
    """
    text = "".join(c if c.isprintable() else _escape(c) for c in os.fspath(name))
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 2 :]}"


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # Python's form of a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()

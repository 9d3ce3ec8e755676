"""The documents of a source while a corpus is made, on disk: they may be more than memory holds.

They lie one after the other, as UTF-8, in a file without a name, which is gone with the process.
Reading them in the order of their hash is then a seek per document, whatever they came from: a
Parquet file would decode a whole row group for each, a compressed one start again from its head.
"""

import os
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

_MOST_LISTED = 1000


class Documents:
    """Documents by position, and what was left out. A context manager: closing frees the disk."""

    def __init__(self, folder: Path | None) -> None:
        """folder: where the file without a name takes its space; None: that of temporary files."""
        self._file = tempfile.TemporaryFile(dir=folder)
        self._ends = array("q")  # bytes
        self.not_utf8: list[str] = []
        """Files left out because they are not UTF-8."""
        self.unreadable_rows: list[str] = []
        """Rows left out with their reason, the first _MOST_LISTED of them."""
        self.n_unreadable_rows = 0
        self.notes: list[str] = []
        """What else the user should know, in sentences."""

    def add(self, text: str) -> None:
        """Append a document. Raises UnicodeEncodeError where it holds half a surrogate pair."""
        raw = text.encode()
        self._file.write(raw)
        self._ends.append(self._start(len(self)) + len(raw))

    def add_unreadable(self, what: str) -> None:
        """Count a row that is left out."""
        self.n_unreadable_rows += 1
        if len(self.unreadable_rows) < _MOST_LISTED:
            self.unreadable_rows.append(what)

    def shorten(self, length: int) -> None:
        """Take back the documents from position `length` on."""
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
        """Give the space back."""
        self._file.close()


def shown(name: str | os.PathLike[str], most: int = 1000) -> str:
    """A name as text that any terminal and any UTF-8 file takes, in one line.

    A file's name is a string of bytes: those that are not UTF-8, and characters that do not print,
    are shown as escapes.
    """
    text = "".join(c if c.isprintable() else _escape(c) for c in os.fspath(name))
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 2 :]}"


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how Python holds a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()

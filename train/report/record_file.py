"""A file to which a run appends records. A disk that is full or not writable costs no step: what
cannot be written waits in memory, and is written in its order as soon as that is possible."""

from pathlib import Path

_BLOCK = 2**13
"""Bytes that are collected for one write."""
_MOST_WAITING = 2**26
"""Bytes that may wait for the disk; later records are lost."""


class RecordFile:
    """Bytes appended to `path`, by one thread."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if the file cannot be opened."""
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._waiting, self._tried = bytearray(), 0
        self.error = ""
        """Why the last write failed; empty if it did not."""
        self.lost = 0
        """Records that were not kept."""

    def write(self, record: bytes) -> None:
        """Add a record, which is written at once or later; raises nothing."""
        if len(self._waiting) + len(record) > _MOST_WAITING:
            self.flush()
        if len(self._waiting) + len(record) > _MOST_WAITING:
            self.lost += 1
            return
        self._waiting += record
        if len(self._waiting) - self._tried >= _BLOCK:
            self.flush()

    def flush(self) -> None:
        """Write what waits, or as much of it as the disk takes."""
        try:
            while self._waiting:
                # the rest of a record that fits in part follows it later
                del self._waiting[: self._file.write(self._waiting)]
            self.error = ""
        except OSError as error:
            self.error = error.strerror or str(error)
        self._tried = len(self._waiting)

    def reopened(self) -> "RecordFile":
        """A new writer of the same path, after `close`, with the records that still wait."""
        other = RecordFile(self.path)
        other._waiting, other.error, other.lost = self._waiting, self.error, self.lost
        return other

    def close(self) -> None:
        """Write what waits, as far as possible, and close the file."""
        self.flush()
        self._file.close()

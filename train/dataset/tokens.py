"""Rows of tokens: an array, or memory-mapped files whose bytes are checked when first read.

A file is checked in blocks of 64 KiB. The first read of a block in a process compares its CRC-32;
so every token that a run trains on is a token that was written, and opening a dataset of any size
takes no time. One sequence of 4,096 tokens of two bytes reads one or two blocks.
"""

import zlib
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np

from configs.errors import UserError
from train.data.documents import shown

BLOCK = 2**16
"""Bytes per checksum."""


class DamagedData(UserError):
    """A file of a dataset whose bytes are not those that were written."""


class Tokens(Protocol):
    """A row of token ids on disk or in memory."""

    dtype: np.dtype

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `[stop - start]`, possibly a view of memory that cannot be written. Raises
        DamagedData."""
        ...

    def place(self, index: int) -> str:
        """File and byte offset of a token, for errors."""
        ...


class ArrayTokens:
    """An array in memory or mapped by the caller."""

    def __init__(self, array: np.ndarray, name: str) -> None:
        self.array, self.name, self.dtype = array.view(np.ndarray), name, array.dtype

    def __len__(self) -> int:
        return len(self.array)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.array[start:stop]

    def place(self, index: int) -> str:
        return f"{self.name}: token {index:,}"


class TokenFile:
    """One file of tokens, mapped, with the CRC-32 of each block if these are known."""

    def __init__(self, path: Path, dtype: np.dtype, length: int, crcs: np.ndarray | None) -> None:
        """length: in tokens. crcs: uint32 `[blocks]`. Raises DamagedData for another size."""
        self.path, self.dtype, self.length = path, dtype, length
        size = length * dtype.itemsize
        try:
            found = path.stat().st_size
        except OSError as error:
            raise DamagedData(f"{shown(path)}: {error.strerror}; restore the file") from None
        if found != size:
            raise DamagedData(
                f"{shown(path)}: {found:,} bytes, {size:,} were written: it ends at byte offset "
                f"{min(found, size):,}; restore the file or prepare the data again"
            )
        self.bytes = (
            np.memmap(path, np.uint8, "r").view(np.ndarray) if size else np.empty(0, np.uint8)
        )
        self._tokens = self.bytes.view(dtype)
        self._crcs = crcs
        self._checked = np.zeros(-(-size // BLOCK), bool)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens of the file. Raises DamagedData."""
        if self._crcs is not None:
            size = self.dtype.itemsize
            self.check(start * size // BLOCK, -(-stop * size // BLOCK))
        return self._tokens[start:stop]

    def check(self, first: int, end: int) -> None:
        """Check the blocks from `first` to before `end` that have not been checked yet."""
        assert self._crcs is not None
        if self._checked[first:end].all():
            return
        for block in range(first, end):
            if self._checked[block]:
                continue
            raw = self.bytes[block * BLOCK : (block + 1) * BLOCK]
            if zlib.crc32(raw.data) != self._crcs[block]:
                start = block * BLOCK
                raise DamagedData(
                    f"{shown(self.path)}: the bytes at offsets {start:,} to "
                    f"{start + len(raw) - 1:,} are not those that were written (CRC-32); restore "
                    "the file or prepare the data again"
                )
            self._checked[block] = True

    def check_all(self) -> None:
        """Check every block."""
        self.check(0, len(self._checked))


class FileTokens:
    """The tokens of several files, one after another."""

    def __init__(self, files: list[TokenFile], dtype: np.dtype) -> None:
        self.files, self.dtype = files, dtype
        self._ends = list(accumulate((file.length for file in files), initial=0))

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, start: int, stop: int) -> np.ndarray:
        index = bisect_right(self._ends, start) - 1
        if index < len(self.files) and stop <= self._ends[index + 1]:
            first = self._ends[index]
            return self.files[index].read(start - first, stop - first)
        parts = []
        while start < stop and index < len(self.files):
            first, end = self._ends[index], min(stop, self._ends[index + 1])
            parts.append(self.files[index].read(start - first, end - first))
            start, index = end, index + 1
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)

    def place(self, index: int) -> str:
        number = min(bisect_right(self._ends, index) - 1, len(self.files) - 1)
        offset = (index - self._ends[number]) * self.dtype.itemsize
        return f"{shown(self.files[number].path)}: byte offset {offset:,}"

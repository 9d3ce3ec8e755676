"""Megatron-LM's pair of files: `.bin` has the tokens, `.idx` the lengths of its sequences.

The header of `.idx` is the bytes `MMIDIDX\\0\\0`, the version (uint64, 1), the code of the dtype
(uint8), the number of sequences and the number of document bounds (uint64 each); then the lengths
(int32), the byte offsets (int64) of the sequences, and the first sequence of each document (int64).
All are little-endian. There are no checksums: sizes are checked when the files are opened, and ids
when they are read.
"""

import hashlib
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from configs.errors import UserError
from train.data.documents import shown
from train.dataset.prepared import Dataset, Split
from train.dataset.tokens import DamagedData, FileTokens, TokenFile

_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_HEADER = struct.Struct("<9sQBQQ")
_MIB = 2**20


def is_megatron(path: Path) -> bool:
    """Whether `path` is the common part of the names of a pair of files, or one of the two."""
    return all(file.is_file() for file in files_of(path))


def files_of(path: Path) -> tuple[Path, Path]:
    """The `.bin` and the `.idx` of a path with or without one of these suffixes."""
    stem = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    return Path(f"{stem}.bin"), Path(f"{stem}.idx")


def open_megatron(path: Path) -> Dataset:
    """Open a pair of files; all of it is the split `train`. Raises UserError."""
    data_file, index_file = files_of(path)
    raw = index_file.read_bytes()
    dtype, lengths, documents = _read_index(index_file, raw)
    n_tokens = int(lengths.sum())
    file = TokenFile(data_file, dtype, n_tokens, crcs=None)
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    offsets = ends[documents]
    offsets = np.concatenate([offsets[:-1][np.diff(offsets) > 0], [n_tokens]])  # without empty ones
    parts = [hashlib.sha256(raw).digest()]
    for start in (0, max(len(file.bytes) - _MIB, 0)):
        parts.append(zlib.crc32(file.bytes[start : start + _MIB].data).to_bytes(4, "little"))
    split = Split(FileTokens([file], dtype), 0, lambda: offsets)
    return Dataset(
        path=path,
        splits={"train": split},
        vocab_size=None,
        tokenizer_file=None,
        eot=None,
        fingerprint=hashlib.sha256(b"".join(parts)).hexdigest(),
    )


def _read_index(file: Path, raw: bytes) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """The dtype, the lengths of the sequences, and the document bounds, of a checked index."""
    if len(raw) < _HEADER.size or not raw.startswith(_MAGIC):
        raise UserError(f"{shown(file)}: not an index of Megatron-LM (it begins with MMIDIDX)")
    _, version, code, n_sequences, n_bounds = _HEADER.unpack_from(raw)
    if version != 1 or code not in _DTYPES:
        raise UserError(
            f"{shown(file)}: version {version}, dtype {code}: only version 1 with integers is read"
        )
    at = _HEADER.size
    needed = at + n_sequences * (4 + 8) + n_bounds * 8
    # multimodal data has one more byte per sequence
    if len(raw) not in (needed, needed + n_sequences):
        raise DamagedData(
            f"{shown(file)}: {len(raw):,} bytes, its header says {needed:,}: it ends at byte "
            f"offset {min(len(raw), needed):,}"
        )
    dtype = np.dtype(_DTYPES[code])
    lengths = np.frombuffer(raw, "<i4", n_sequences, at)
    pointers = np.frombuffer(raw, "<i8", n_sequences, at + 4 * n_sequences)
    bounds = np.frombuffer(raw, "<i8", n_bounds, at + 12 * n_sequences)
    if (lengths < 0).any():
        raise DamagedData(f"{shown(file)}: sequence {int((lengths < 0).argmax())} is negative")
    expected = np.cumsum(lengths, dtype=np.int64) - lengths
    wrong = np.flatnonzero(pointers != expected * dtype.itemsize)
    if len(wrong):
        where = at + 4 * n_sequences + 8 * int(wrong[0])
        raise DamagedData(
            f"{shown(file)}: byte offset {where:,}: sequence {wrong[0]:,} does not follow the one "
            "before it"
        )
    valid = n_bounds > 0 and bounds[0] == 0 and bounds[-1] == n_sequences
    if not valid or (np.diff(bounds) < 0).any():
        raise DamagedData(f"{shown(file)}: its document bounds are not increasing to its end")
    return dtype, lengths, bounds


class MegatronWriter:
    """Writes a pair of files: each document is one sequence, its tokens and then the end of text,
    as Megatron's `--append-eod` does."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        """path: without suffix. dtype: uint16, or int32 for any other."""
        self._code = 8 if dtype.itemsize == 2 else 4
        self.dtype = np.dtype(_DTYPES[self._code])
        self._data_file, self._index_file = files_of(path)
        self._file = open(self._data_file, "wb")
        self._lengths: list[np.ndarray] = []

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents that begin with the end-of-text token, `[sum(lengths)]` in all."""
        if len(tokens):
            starts = np.cumsum(lengths) - lengths
            ends = starts + lengths - 1
            moved = np.empty_like(tokens)
            moved[:-1] = tokens[1:]
            moved[ends] = tokens[starts]
            self._file.write(moved.astype(self.dtype).tobytes())
        self._lengths.append(lengths.astype("<i4"))

    def close(self) -> None:
        """Write the index."""
        self._file.close()
        lengths = np.concatenate([np.empty(0, "<i4"), *self._lengths])
        ends = np.cumsum(lengths, dtype=np.int64)
        parts: Iterable[bytes] = (
            _HEADER.pack(_MAGIC, 1, self._code, len(lengths), len(lengths) + 1),
            lengths.tobytes(),
            ((ends - lengths) * self.dtype.itemsize).astype("<i8").tobytes(),
            np.arange(len(lengths) + 1, dtype="<i8").tobytes(),
        )
        with open(self._index_file, "wb") as file:
            file.writelines(parts)

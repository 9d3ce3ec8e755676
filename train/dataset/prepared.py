"""A dataset that `scripts.prepare_data` wrote: its files, how they are written and opened.

    index.json                what is below: counts, checksums, statistics, settings
    train-00000.bin, ...      token ids, little-endian uint16 or uint32, no header
    train.documents.bin       where each document begins, and the end: int64 [documents + 1]
    train.crc32.bin           CRC-32 of each block of 64 KiB of the token files: uint32 [blocks]
    validation-00000.bin ...  the same for the documents held out
    tokenizer.json, tokenizer_config.json, lengths.png

Each document is the end-of-text token and then its tokens, in the order of the sources. The index
has the SHA-256 of the small files; the blocks of the large ones are checked when they are read
(`train.dataset.tokens`).
"""

import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from configs.errors import UserError
from train.data.documents import shown
from train.dataset.tokens import BLOCK, DamagedData, FileTokens, TokenFile, Tokens

FORMAT = "phalanx-tokens"
VERSION = 1
INDEX = "index.json"
SPLITS = ("train", "validation")
SHARD_BYTES = 2**30


@dataclass(frozen=True)
class Split:
    """The tokens of one part of a dataset."""

    tokens: Tokens
    n_bytes: int
    """UTF-8 bytes of the text; 0: not known."""
    load_offsets: Callable[[], np.ndarray]
    """Returns `offsets`; called once, if they are needed."""

    @cached_property
    def offsets(self) -> np.ndarray:
        """First token of each document, and the number of all tokens: int64 `[documents + 1]`.

        Raises DamagedData.
        """
        return self.load_offsets()


@dataclass(frozen=True)
class Dataset:
    """A tokenized dataset, opened."""

    path: Path
    splits: dict[str, Split]
    vocab_size: int | None
    """Rows that its tokens need; None: not known."""
    tokenizer_file: Path | None
    eot: int | None
    """The token that begins every document; None: only `Split.offsets` has the boundaries."""
    fingerprint: str
    """Hash of the tokens: equal for the same data."""


def open_prepared(path: Path) -> Dataset:
    """Open a folder of `scripts.prepare_data`. Raises UserError."""
    index = read_index(path)
    try:
        dtype = np.dtype(index["dtype"]).newbyteorder("<")
        if dtype not in (np.dtype("<u2"), np.dtype("<u4")):
            raise ValueError(f"dtype {dtype}")
        splits = {name: _open_split(path, index["splits"][name], dtype) for name in SPLITS}
        _checked_file(path / "tokenizer.json", index["tokenizer_sha256"])
        return Dataset(
            path=path,
            splits=splits,
            vocab_size=int(index["vocab_size"]),
            tokenizer_file=path / "tokenizer.json",
            eot=int(index["eot"]),
            fingerprint=str(index["fingerprint"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise DamagedData(
            f"{shown(path / INDEX)}: not a valid index: {type(error).__name__}: {error}"
        ) from None


def read_index(path: Path) -> dict[str, Any]:
    """The index of a dataset, compared with its own fingerprint. Raises UserError."""
    file = path / INDEX
    try:
        index = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise UserError(
            f"{shown(file)}: {error.strerror}; name a folder of scripts.prepare_data, or the "
            "common part of the names of Megatron's .bin and .idx"
        ) from None
    except ValueError as error:
        raise DamagedData(f"{shown(file)}: not valid JSON: {error}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise UserError(f"{shown(file)}: not an index of scripts.prepare_data")
    if index.get("version") != VERSION:
        raise UserError(
            f"{shown(file)}: version {str(index.get('version'))[:20]} of the format, this program "
            f"reads {VERSION}; prepare the data again"
        )
    if index.get("fingerprint") != fingerprint_of(index):
        raise DamagedData(f"{shown(file)}: its fingerprint does not match; prepare the data again")
    return index


def fingerprint_of(index: dict[str, Any]) -> str:
    """Hash of the parts of an index that determine the tokens and their order."""
    keys = ("format", "version", "dtype", "eot", "vocab_size", "tokenizer_sha256", "splits")
    parts = {key: index.get(key) for key in keys}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def verify(path: Path) -> int:
    """Compare every byte of a dataset with its checksums; returns the bytes. Raises DamagedData."""
    size = 0
    for split in open_prepared(path).splits.values():
        assert isinstance(split.tokens, FileTokens)
        for file in split.tokens.files:
            file.check_all()
            size += len(file.bytes)
        size += split.offsets.nbytes
    return size


def _open_split(path: Path, entry: dict[str, Any], dtype: np.dtype) -> Split:
    crcs = np.frombuffer(_checked_file(path / entry["crc32"]["file"], entry["crc32"]["sha256"]),
                         "<u4")  # fmt: skip
    files, first = [], 0
    for shard in entry["shards"]:
        blocks = -(-shard["tokens"] * dtype.itemsize // BLOCK)
        part = crcs[first : first + blocks]
        files.append(TokenFile(path / shard["file"], dtype, shard["tokens"], part))
        first += blocks
    if first != len(crcs) or sum(file.length for file in files) != entry["tokens"]:
        raise ValueError("the shards do not match their checksums")
    file, sha256 = path / entry["offsets"]["file"], entry["offsets"]["sha256"]
    if not file.is_file():
        raise DamagedData(f"{shown(file)}: missing; restore the file")

    def load_offsets() -> np.ndarray:
        offsets = np.frombuffer(_checked_file(file, sha256), "<i8")
        if len(offsets) != entry["documents"] + 1 or offsets[-1] != entry["tokens"]:
            raise DamagedData(f"{shown(file)}: does not match {INDEX}")
        return offsets

    return Split(FileTokens(files, dtype), int(entry["bytes"]), load_offsets)


def _checked_file(path: Path, sha256: str) -> bytes:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DamagedData(f"{shown(path)}: {error.strerror}; restore the file") from None
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise DamagedData(
            f"{shown(path)}: not the bytes that were written (SHA-256); restore the file or "
            "prepare the data again"
        )
    return raw


class SplitWriter:
    """Writes one part of a dataset, document by document or many at once."""

    def __init__(
        self, folder: Path, name: str, dtype: np.dtype, shard_bytes: int = SHARD_BYTES
    ) -> None:
        """shard_bytes: size of a token file, a multiple of 64 KiB."""
        assert shard_bytes % BLOCK == 0
        self.folder, self.name, self.dtype = folder, name, dtype.newbyteorder("<")
        self.shard_bytes = shard_bytes
        self.n_documents = self.n_tokens = self.n_bytes = 0
        self._shards: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._offsets = open(folder / f"{name}.documents.bin", "wb")
        self._offsets.write(np.zeros(1, "<i8").tobytes())
        self._crcs = open(folder / f"{name}.crc32.bin", "wb")
        self._rest = b""
        self._written = 0  # bytes of the current shard

    def add(self, tokens: np.ndarray, lengths: np.ndarray, n_bytes: int) -> None:
        """Append documents: their tokens `[sum(lengths)]` and lengths, and the bytes of their
        text."""
        ends = self.n_tokens + np.cumsum(lengths, dtype=np.int64)
        self._offsets.write(ends.astype("<i8").tobytes())
        self.n_documents += len(lengths)
        self.n_tokens += len(tokens)
        self.n_bytes += n_bytes
        assert int(lengths.sum()) == len(tokens)
        if not len(tokens):
            return
        raw = np.ascontiguousarray(tokens, self.dtype).data.cast("B")
        while len(raw):
            if self._file is None:
                name = f"{self.name}-{len(self._shards):05d}.bin"
                self._file = open(self.folder / name, "wb")
                self._shards.append({"file": name, "tokens": 0})
                self._written = 0
            part = raw[: self.shard_bytes - self._written]
            self._write(part)
            raw = raw[len(part) :]
            if self._written == self.shard_bytes:
                self._end_shard()

    def _write(self, part: memoryview) -> None:
        assert self._file is not None
        self._file.write(part)
        self._written += len(part)
        self._shards[-1]["tokens"] += len(part) // self.dtype.itemsize
        pending = self._rest + bytes(part)
        whole = len(pending) // BLOCK * BLOCK
        view = memoryview(pending)
        crcs = [zlib.crc32(view[at : at + BLOCK]) for at in range(0, whole, BLOCK)]
        self._crcs.write(np.array(crcs, "<u4").tobytes())
        self._rest = pending[whole:]

    def _end_shard(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._rest:
            self._crcs.write(np.array([zlib.crc32(self._rest)], "<u4").tobytes())
            self._rest = b""

    def close(self) -> dict[str, Any]:
        """Finish the files; returns their entry of the index."""
        self._end_shard()
        self._offsets.close()
        self._crcs.close()
        return {
            "tokens": self.n_tokens,
            "documents": self.n_documents,
            "bytes": self.n_bytes,
            "shards": self._shards,
            "offsets": _stamp(self.folder / f"{self.name}.documents.bin"),
            "crc32": _stamp(self.folder / f"{self.name}.crc32.bin"),
        }


def _stamp(path: Path) -> dict[str, str]:
    with open(path, "rb") as file:
        return {"file": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}

"""The GGUF container: metadata, and tensors that the `gguf` package dequantizes.

The header is parsed here and not by `gguf.GGUFReader`, which does not check lengths: an array
with a claimed length of 2^60 numbers keeps it busy forever. Every length is compared with the rest
of the file before memory of its size is allocated, and every tensor's bytes must be in the file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3).
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError

_SCALARS = "BbHhIif?"
"""Struct codes of value types 0 to 7; 10 to 12 are Q, q and d."""
_CODES = dict(enumerate(_SCALARS)) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Stored:
    """Location of a tensor."""

    shape: tuple[int, ...]
    """Rows first, as in torch."""
    kind: int
    """ggml's number of the (quantized) type."""
    start: int
    n_bytes: int


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file whose header was read and checked."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Stored]

    def get(self, key: str, kind: type) -> Any:
        """Metadata `key`, which must be there and of that type."""
        value = self.metadata.get(key)
        if type(value) is not kind:
            raise UserError(f"{self.path}: {key} = {value!r}: must be {kind.__name__}")
        return value

    def read(self, name: str) -> Tensor:
        """A tensor, dequantized to fp32."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        t = self.tensors[name]
        raw = np.fromfile(self.path, dtype=np.uint8, count=t.n_bytes, offset=t.start)
        kind = GGMLQuantizationType(t.kind)
        try:
            value = dequantize(raw.reshape(*t.shape[:-1], -1), kind)
        except NotImplementedError:
            raise UserError(f"{self.path}: {name}: type {kind.name} is not read") from None
        return torch.from_numpy(np.array(value, dtype=np.float32))


def open_gguf(path: Path) -> GgufFile:
    """Read the header of `path`. Raises UserError if it is damaged or `gguf` is missing."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError(f"{path}: GGUF files need the package gguf: pip install gguf") from None
    try:
        return _Header(path).parse()
    except (struct.error, ValueError) as error:
        raise UserError(f"{path}: not a readable GGUF file: {error}") from None


class _Header:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = np.memmap(path, dtype=np.uint8, mode="r").data if path.stat().st_size else b""
        self.at = 0

    def parse(self) -> GgufFile:
        if self.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self.scalar("I")
        if version not in (2, 3):
            raise ValueError(f"version {version}, expected 2 or 3")
        n_tensors, n_values = self.scalar("Q"), self.scalar("Q")
        metadata = {self.string(): self.value() for _ in range(self.checked(n_values, 12))}
        rows = [self.tensor() for _ in range(self.checked(n_tensors, 24))]
        align = metadata.get("general.alignment", 32)
        if type(align) is not int or align < 1:
            raise ValueError(f"general.alignment = {align!r}")
        start = -(-self.at // align) * align
        tensors = {row[0]: self.stored(start, *row) for row in rows}
        if len(tensors) != len(rows):
            raise ValueError("two tensors have the same name")
        return GgufFile(self.path, metadata, tensors)

    def take(self, n: int) -> bytes:
        if n > len(self.data) - self.at:
            raise ValueError(f"it ends within {n} bytes at {self.at}")
        self.at += n
        return bytes(self.data[self.at - n : self.at])

    def checked(self, count: int, size: int) -> int:
        """Return `count` after checking that the rest of the file has `count` entries of `size`
        bytes."""
        if count * size > len(self.data) - self.at:
            raise ValueError(f"it has no room for {count} entries at {self.at}")
        return count

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode()

    def value(self) -> Any:
        kind = self.scalar("I")
        if kind != _ARRAY:
            return self.string() if kind == _STRING else self.scalar(self.code(kind))
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == _STRING:
            return [self.string() for _ in range(self.checked(count, 8))]
        code = self.code(kind)
        raw = self.take(self.checked(count, struct.calcsize(f"<{code}")) * struct.calcsize(code))
        return list(struct.unpack(f"<{count}{code}", raw))

    def code(self, kind: int) -> str:
        if kind not in _CODES:
            raise ValueError(f"value type {kind} at {self.at}")
        return _CODES[kind]

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, n_dims = self.string(), self.scalar("I")
        if n_dims > 4:
            raise ValueError(f"{name} has {n_dims} dimensions")
        shape = tuple(self.scalar("Q") for _ in range(n_dims))[::-1]
        return name, shape, self.scalar("I"), self.scalar("Q")

    def stored(
        self, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int
    ) -> Stored:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if not shape or shape[-1] % block:
            raise ValueError(f"{name} has shape {list(shape)}, its rows come in blocks of {block}")
        n_bytes = int(np.prod(shape, dtype=object)) // block * size
        if start + offset + n_bytes > len(self.data):
            raise ValueError(f"{name} ends beyond the file")
        return Stored(shape, kind, start + offset, n_bytes)

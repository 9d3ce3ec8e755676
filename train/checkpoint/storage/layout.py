"""The layout of a safetensors file, known before its tensors are.

The library writes a file from tensors that are all in memory. Here the header and the place of
every tensor are computed from shapes alone, so that a snapshot can be copied to its place in an
image of the file, and a file can be written tensor by tensor. Format: 8 bytes with the length of
the header (little-endian), the header (JSON, padded with spaces to a multiple of 8 bytes), and the
tensors without gaps. As in the library's files, tensors with wider elements come first, so every
tensor is aligned.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


@dataclass(frozen=True)
class FileLayout:
    """The header of a file and the place of each of its tensors."""

    header: bytes
    """With its length and padding: the first bytes of the file."""
    places: dict[str, tuple[int, int]]
    """Name -> first byte and end in the file, in the order of the file."""
    size: int
    """Bytes of the whole file."""


def file_layout(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> FileLayout:
    """The layout of a file with these tensors: name -> (dtype as safetensors names it, shape)."""
    ordered = sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name][0]], name))
    entries, places, offset = dict[str, dict[str, Any]](), dict[str, tuple[int, int]](), 0
    for name in ordered:
        dtype, shape = tensors[name]
        end = offset + ITEM_BYTES[dtype] * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        places[name] = offset, end
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    start = len(header)
    places = {name: (start + first, start + end) for name, (first, end) in places.items()}
    return FileLayout(header, places, start + offset)

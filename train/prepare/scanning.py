"""First pass over a unit: what each document is, without its text."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from train.atomic_files import naming
from train.data.dedup import HASHES, signature
from train.data.rows import Column
from train.prepare.plan import Plan, partial_of, write_bytes
from train.prepare.reading import NOT_UTF8, REJECTIONS, UNREADABLE, Rejected, documents_of

KEPT = 255
"""Status of a document with text; others are an index of REJECTIONS."""
DIGEST_BYTES = 16
_MOST_LISTED = 1000


def scan(plan: Plan, work: Path, number: int) -> dict[str, Any]:
    """Read unit `number` and write its results; returns its counts.

    Raises UserError for what cannot be read, if `unreadable` is refuse.
    """
    unit, options = plan.units[number], plan.options
    plan.check_inputs(unit)
    status, sizes = bytearray(), []
    digests, signatures, with_signature = bytearray(), bytearray(), bytearray()
    column = Column(options.text_field)
    listed: list[str] = []
    single = unit.kind not in ("texts",)
    for document in documents_of(unit, column):
        if isinstance(document, Rejected):
            status.append(REJECTIONS.index(document.why))
            if document.why in (UNREADABLE, NOT_UTF8):
                if options.unreadable == "refuse" and (single or document.why == UNREADABLE):
                    raise UserError(f"{document.where}; fix it, or skip it with --unreadable skip")
                listed.append(document.where)
            continue
        raw = document.encode()
        status.append(KEPT)
        sizes.append(len(raw))
        digests += digest_of(raw)
        values = signature(raw) if options.near_duplicate_threshold < 1.0 else None
        with_signature.append(values is not None)
        if values is not None:
            signatures += values.tobytes()
    _save(
        work / "scan" / f"{number}.npz",
        status=np.frombuffer(status, np.uint8),
        sizes=np.array(sizes, np.int64),
        digests=np.frombuffer(digests, np.uint8).reshape(-1, DIGEST_BYTES),
        with_signature=np.frombuffer(with_signature, bool),
        signatures=np.frombuffer(signatures, np.uint32).reshape(-1, HASHES),
    )
    counts = Counter(status)
    found = {
        "documents": len(status),
        "bytes": sum(sizes),
        "column": {"found": column.found, "missed": column.missed, "others": [*column.others][:10]},
        "rejected": {why: counts[index] for index, why in enumerate(REJECTIONS)},
        "listed": listed[:_MOST_LISTED],
    }
    write_bytes(work / "scan" / f"{number}.json", json.dumps(found).encode())
    return found


def digest_of(raw: bytes) -> bytes:
    """The content hash of a document."""
    return hashlib.blake2b(raw, digest_size=DIGEST_BYTES).digest()


def _save(path: Path, **arrays: np.ndarray) -> None:
    partial = partial_of(path)
    with naming(path):
        np.savez(partial, allow_pickle=False, **arrays)
    partial.rename(path)


def load_digests(work: Path, number: int) -> np.ndarray:
    """Content hashes of the documents with text of a unit, uint8 `[documents, DIGEST_BYTES]`."""
    with np.load(work / "scan" / f"{number}.npz", allow_pickle=False) as arrays:
        digests: np.ndarray = arrays["digests"]
    return digests


def load_scan(work: Path, number: int) -> dict[str, np.ndarray]:
    """The arrays of a unit that has been scanned."""
    with np.load(work / "scan" / f"{number}.npz", allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}

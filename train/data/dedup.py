"""Duplicate documents: exact ones by content hash, near ones by MinHash over lines.

The method (Broder 1997, "On the resemblance and containment of documents"). Let a document be the
set of its lines and J = |A & B| / |A | B| the Jaccard similarity of two of them. Hash every line
with one function and keep the smallest value: two documents agree on that minimum with probability
J, because each line of the union has the minimum with equal probability. With K = 128 functions the
share of agreements estimates J without bias and with standard error sqrt(J (1 - J) / K): 0.035 at
J = 0.8, 0.044 at its worst (J = 0.5). A signature is 512 bytes for a document of any length.

Comparing all pairs is quadratic, so signatures are cut into bands of r values, and only documents
that agree on a whole band are compared; `train.data.near_duplicates` describes how, also for many
documents that share lines. A pair at J = t agrees on no band with probability (1 - t^r)^(K/r);
`band_rows` uses the longest bands that keep this under 1e-4, then the estimate over all K values
decides.

Lines are stripped, so that indentation does not matter, and lines under six characters (`else:`,
`}`) are ignored, since every program has them. A document without a longer line can only be an
exact duplicate. Not implemented: shingles of words, which would also detect re-wrapped prose.
"""

import hashlib
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from train.data.near_duplicates import NearDuplicateIndex
from train.data.progress import reported

HASHES = 128
SHORTEST_LINE = 6
_MISS = 1e-4
_CHUNK = 4096  # lines hashed at once: bounds the table to 4096 * 128 * 8 bytes = 4 MiB

_CONSTANTS = np.frombuffer(hashlib.shake_128(b"minhash").digest(16 * HASHES), dtype="<u8")
_FACTORS = _CONSTANTS[:HASHES, None] | np.uint64(1)
_OFFSETS = _CONSTANTS[HASHES:, None]


@dataclass(frozen=True)
class DedupResult:
    """The documents of a corpus to keep, in content-hash order (which is also the shuffle)."""

    kept: list[int]
    """Positions of the kept documents."""
    digests: list[bytes]
    """BLAKE2b-128 of each kept document's UTF-8 bytes."""
    sizes: list[int]
    """UTF-8 bytes of each kept document."""
    n_empty: int
    n_exact: int
    n_near: int
    n_compared: int
    """Pairs of signatures that were compared."""


def find_duplicates(
    texts: Iterable[str], threshold: float, log: Callable[[str], None] = lambda line: None
) -> DedupResult:
    """Read every document once and drop empty, equal and nearly equal ones.

    threshold: estimated Jaccard similarity from which a document is dropped; 1.0 drops exact copies
    only. Of similar documents the first in content-hash order is kept, so the result does not
    depend on the order of reading.
    """
    found: dict[bytes, int] = {}  # digest -> row in the lists below
    positions: list[int] = []
    sizes: list[int] = []
    signatures = bytearray()
    signature_of: dict[int, int] = {}  # row -> number of its signature
    n_empty = n_exact = 0
    for position, text in enumerate(
        reported(texts, log, lambda n: f"duplicates: {n:,} documents read so far")
    ):
        if not text.strip():
            n_empty += 1
            continue
        raw = text.encode()
        digest = hashlib.blake2b(raw, digest_size=16).digest()
        if digest in found:
            n_exact += 1
            continue
        row = found[digest] = len(positions)
        positions.append(position)
        sizes.append(len(raw))
        values = signature(raw) if threshold < 1.0 else None
        if values is not None:
            signature_of[row] = len(signature_of)
            signatures += values.tobytes()
    digests = sorted(found)
    order = [found[digest] for digest in digests]
    table = np.frombuffer(signatures, np.uint32).reshape(-1, HASHES)
    chosen, n_compared = drop_similar([signature_of.get(r) for r in order], table, threshold, log)
    return DedupResult(
        kept=[positions[order[i]] for i in chosen],
        digests=[digests[i] for i in chosen],
        sizes=[sizes[order[i]] for i in chosen],
        n_empty=n_empty,
        n_exact=n_exact,
        n_near=len(order) - len(chosen),
        n_compared=n_compared,
    )


def signature(raw: bytes) -> np.ndarray | None:
    """MinHash of a document's lines: uint32 [HASHES], or None if all lines are too short.

    A line's CRC-32 x is hashed by HASHES functions (a x + b mod 2^64) >> 32 with odd a
    (multiply-shift, Dietzfelbinger 1997). CRC-32, because Python's own hash changes with every
    process; two of a document's lines collide with probability 2^-32.
    """
    stripped = map(bytes.strip, raw.splitlines())
    lines = {zlib.crc32(line) for line in stripped if len(line) >= SHORTEST_LINE}
    if not lines:
        return None
    x = np.fromiter(lines, dtype=np.uint64, count=len(lines))
    least = np.full(HASHES, np.iinfo(np.uint64).max)
    for start in range(0, len(x), _CHUNK):
        hashed = _FACTORS * x[start : start + _CHUNK]
        hashed += _OFFSETS
        np.minimum(least, hashed.min(axis=1), out=least)
    # The minimum of the high halves is the high half of the minimum: one shift instead of many.
    return (least >> np.uint64(32)).astype(np.uint32)


def band_rows(threshold: float) -> int:
    """Values per band: the longest power of two that misses under 1e-4 of pairs at threshold."""
    rows = 1
    while rows < HASHES and (1 - threshold ** (2 * rows)) ** (HASHES // (2 * rows)) <= _MISS:
        rows *= 2
    return rows


def split(digests: list[bytes], fraction: float) -> np.ndarray:
    """Which documents are held out, bool `[documents]`: about `fraction` of them, at least one,
    and at least one is not. digests: two or more, 16 bytes each."""
    # The first half of a digest determines the order, the second the split: they are independent.
    place = np.array([int.from_bytes(digest[8:], "big") / 2**64 for digest in digests])
    held_out = place < fraction
    held_out[place.argmin()] = True
    if held_out.all():
        held_out[place.argmax()] = False
    return held_out


def drop_similar(
    rows: list[int | None], signatures: np.ndarray, threshold: float, log: Callable[[str], None]
) -> tuple[list[int], int]:
    """Indices of `rows` to keep, each compared with those kept before it, and the comparisons.

    rows: of `signatures`, uint32 [documents with one, HASHES]; None for a document without.
    """
    index = NearDuplicateIndex(signatures, threshold, band_rows(threshold))
    chosen: list[int] = []

    def line(done: int) -> str:
        return f"duplicates: {done:,} of {len(rows):,} documents compared, {len(chosen):,} kept"

    for i, row in enumerate(reported(rows, log, line)):
        if row is not None:
            if index.has_similar(row):
                continue
            index.add(row)
        chosen.append(i)
    return chosen, index.n_compared

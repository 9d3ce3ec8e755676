"""Finds a signature that agrees with a new one among earlier ones: locality-sensitive hashing.

Comparing all pairs is quadratic, so signatures are cut into bands of r values, and only documents
that agree on a whole band are compared (Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets",
chapter 3). `train.data.dedup.band_rows` chooses r.

Bands alone are quadratic again if documents share lines without being duplicates, such as the same
license header: a band whose minima all come from it is the same in a fixed share of them. So a
crowded bucket is divided: twice, each time by s further values, with s such that a pair at the
threshold t agrees on all s with probability 1/2 or more. Of such a pair one copy still meets on
average; of a pair at similarity j the copies decrease by (j/t)^s, at every level (the exponent of
LSH, ln t / ln j, Har-Peled, Indyk, Motwani 2012). At t = 0.8 a pair shares 13 of its 32 bands on
average, so it meets in some bucket although one divided bucket may separate it. Of 600,000
simulated pairs that agree on 103 of 128 values, the fewest that reach 0.8, none was missed if every
bucket was divided once, 7e-6 if twice, 9e-5 three times, 1.2e-3 five times, the maximum.

Before that, sorting removes documents that cannot have a near-duplicate: those with so many unique
values that the other values are below the threshold. With 30 lines of a template and 8 own lines (J
= 0.65, close to t) that is two in three, and without a template nearly every document. Bands that
no other document has are found by sorting, too, and are never stored in a Python table. Only
signatures that are kept are indexed, so a family of a thousand near-duplicates is one entry.
"""

from operator import itemgetter
from typing import Any

import numpy as np

CROWDED = 32
"""Entries from which a bucket is divided: comparing this many takes as long as one level."""
_MOST_NODES = 64  # below one band: bounds memory and time if dividing does not help


class _Divided:
    """A divided bucket: per division, the getter of the values and the buckets below."""

    __slots__ = ("children", "getters", "number")

    def __init__(self, number: int, getters: list[Any]) -> None:
        self.number, self.getters = number, getters
        self.children: list[dict[Any, Any]] = [{} for _ in getters]


class NearDuplicateIndex:
    """Finds whether an added signature agrees with another on a share of its values.

    N documents, H values each.
    """

    def __init__(self, signatures: np.ndarray, threshold: float, band_rows: int) -> None:
        """signatures: uint32 `[N, H]`, all that may be looked up. threshold: the share."""
        self.n_compared = 0
        """Pairs of signatures that were compared."""
        rows = _possible(signatures, threshold)
        self._place = np.full(len(signatures), -1)
        self._place[rows] = np.arange(len(rows))
        self.signatures, self.threshold = signatures[rows], threshold
        self._low = self.signatures.astype(np.uint8)  # a quarter of the memory traffic
        self._groups = _shared_bands(self.signatures, band_rows)
        self._bands, self._band_rows = signatures.shape[1] // band_rows, band_rows
        self._ways, self._values = _division(threshold)
        self._getters: dict[tuple[int, int], Any] = {}
        self._buckets: dict[int, Any] = {}

    def has_similar(self, row: int) -> bool:
        """Whether an added signature agrees with that of `row` on the threshold or more."""
        row = int(self._place[row])
        rivals = self._rivals(row) if row >= 0 else set()
        if not rivals:
            return False
        self.n_compared += len(rivals)
        found = np.fromiter(rivals, np.int64, len(rivals))
        share = self.signatures.shape[1] * self.threshold
        # equal low bytes are necessary, equal values sufficient
        found = found[np.count_nonzero(self._low[found] == self._low[row], axis=1) >= share]
        agree = np.count_nonzero(self.signatures[found] == self.signatures[row], axis=1)
        return bool((agree >= share).any())

    def add(self, row: int) -> None:
        """Make later signatures be compared with that of `row`."""
        row = int(self._place[row])
        if row < 0:
            return
        values: list[int] = []
        for group in self._groups_of(row):
            bucket = self._buckets.get(group)
            if bucket is None:
                self._buckets[group] = [row]
            elif isinstance(bucket, list) and len(bucket) < CROWDED:
                bucket.append(row)
            else:
                values = values or self.signatures[row].tolist()
                self._buckets[group] = self._put(bucket, row, values, group % self._bands, 0)

    def _groups_of(self, row: int) -> list[int]:
        groups = self._groups[row]
        found: list[int] = groups[groups >= 0].tolist()
        return found

    def _rivals(self, row: int) -> set[int]:
        """Indices of added rows that share a bucket with `row`."""
        rivals: set[int] = set()
        pending = [self._buckets[g] for g in self._groups_of(row) if g in self._buckets]
        values: list[int] = []
        while pending:
            bucket = pending.pop()
            if isinstance(bucket, list):
                rivals.update(bucket)
                continue
            values = values or self.signatures[row].tolist()
            for getter, children in zip(bucket.getters, bucket.children, strict=True):
                child = children.get(getter(values))
                if child is not None:
                    pending.append(child)
        return rivals

    def _put(self, bucket: Any, row: int, values: list[int], band: int, number: int) -> Any:
        """Add a row below `bucket`, the node `number` of its band; returns its replacement."""
        if isinstance(bucket, list):
            if len(bucket) < CROWDED or self._ways * (number + 1) > _MOST_NODES:
                bucket.append(row)
                return bucket
            members, bucket = bucket, self._divide(band, number)
            for member in members:
                self._put(bucket, member, self.signatures[member].tolist(), band, number)
        for way, getter in enumerate(bucket.getters):
            key, children = getter(values), bucket.children[way]
            child = children.get(key)
            below = self._ways * number + way + 1
            children[key] = [row] if child is None else self._put(child, row, values, band, below)
        return bucket

    def _divide(self, band: int, number: int) -> _Divided:
        return _Divided(
            number, [self._getter(band, self._ways * number + way + 1) for way in range(self._ways)]
        )

    def _getter(self, band: int, number: int) -> Any:
        """Gets the values that select a node of a band: none of the band, and along one path others
        at each node, as far as available."""
        if (band, number) not in self._getters:
            first = band * self._band_rows
            own = range(first, first + self._band_rows)
            others = [i for i in range(self.signatures.shape[1]) if i not in own]
            order = np.random.default_rng(band).permutation(others)
            start = (number - 1) * self._values
            chosen = order.take(range(start, start + self._values), mode="wrap")
            self._getters[band, number] = itemgetter(*chosen.tolist())
        return self._getters[band, number]


def _division(threshold: float) -> tuple[int, int]:
    """The number of divisions of a bucket, and the number of values of each."""
    if threshold < 0.5:
        return min(8, int(np.ceil(1 / max(threshold, 0.01)))), 1
    return 2, max(1, int(np.log(0.5) / np.log(min(threshold, 0.99))))


def _possible(signatures: np.ndarray, threshold: float) -> np.ndarray:
    """Rows that may agree with another row on the threshold or more: those of which enough values
    occur in others among them, too."""
    rows = np.arange(len(signatures))
    while True:
        shared = np.zeros(len(rows), np.int64)
        for values in signatures[rows].T:
            _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
            shared += counts[inverse] > 1
        stay = shared >= signatures.shape[1] * threshold
        if np.count_nonzero(stay) >= 0.9 * len(rows):  # another pass would not help
            return rows[stay]
        rows = rows[stay]


def _shared_bands(signatures: np.ndarray, band_rows: int) -> np.ndarray:
    """For each document and band, int64 `[N, bands]`: a number that is the same for documents which
    agree on the band; -1 if no other document agrees. The number modulo `bands` is the band."""
    n, width = signatures.shape
    bands = width // band_rows
    factors = np.random.default_rng(0).integers(2**63, size=band_rows, dtype=np.uint64) * 2 + 1
    groups = np.full((n, bands), -1, np.int64)
    for band in range(bands):
        values = signatures[:, band * band_rows : (band + 1) * band_rows]
        hashed = (values * factors).sum(axis=1, dtype=np.uint64)
        _, inverse, counts = np.unique(hashed, return_inverse=True, return_counts=True)
        shared = counts[inverse] > 1
        groups[shared, band] = inverse[shared] * bands + band
    return groups

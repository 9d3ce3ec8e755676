"""Which documents are dropped as duplicates, and which are held out for validation.

Of equal documents the first in the order of the units is kept; of nearly equal ones the first by
content hash. A document is held out if its hash is below the validation fraction, as in
`train.data.dedup.split`. Both depend on the documents alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.errors import UserError
from train.data.dedup import HASHES, drop_similar, split
from train.prepare.plan import Plan, write_bytes
from train.prepare.scanning import KEPT, load_scan

REJECTED, EQUAL, NEARLY_EQUAL, TRAIN, VALIDATION = range(5)
"""Decisions about a document."""
DECISIONS = "decisions.bin"


@dataclass(frozen=True)
class Decisions:
    """Decision of each document, uint8 `[documents]`, units one after another."""

    values: np.ndarray
    starts: np.ndarray
    """First document of each unit, and the number of all, int64 `[units + 1]`."""

    def of_unit(self, number: int) -> np.ndarray:
        return self.values[self.starts[number] : self.starts[number + 1]]


def decide(plan: Plan, work: Path, log: Callable[[str], None]) -> Decisions:
    """Compare all documents. Memory: 60 bytes per document, and 520 with signatures."""
    parts = [load_scan(work, number) for number in range(len(plan.units))]
    starts = np.cumsum([0, *(len(part["status"]) for part in parts)])
    status = np.concatenate([np.empty(0, np.uint8), *(part["status"] for part in parts)])
    values = np.full(len(status), REJECTED, np.uint8)
    where = np.flatnonzero(status == KEPT)
    digests = np.concatenate([np.empty((0, 16), np.uint8), *(part["digests"] for part in parts)])
    names = np.ascontiguousarray(digests).view("V16").reshape(-1)
    # by content hash, and for equal ones in the order of the units
    high, low = digests.view(">u8").reshape(-1, 2).T if len(digests) else np.empty((2, 0))
    order = np.lexsort((low, high))
    is_new = np.ones(len(order), bool)
    is_new[1:] = names[order][1:] != names[order][:-1]
    values[where] = EQUAL
    order = order[is_new]
    chosen = _not_similar(plan, parts, order, log)
    values[where[order]] = NEARLY_EQUAL
    kept = order[chosen]
    values[where[kept]] = TRAIN
    fraction = plan.options.validation_fraction
    if fraction and len(kept) > 1:
        held_out = split([digests[row].tobytes() for row in kept], fraction)
        values[where[kept[held_out]]] = VALIDATION
    if not (values == TRAIN).any():
        raise UserError("no documents are left to train on: the sources have no text")
    write_bytes(work / DECISIONS, values.tobytes())
    return Decisions(values, starts)


def _not_similar(
    plan: Plan, parts: list[dict[str, np.ndarray]], order: np.ndarray, log: Callable[[str], None]
) -> np.ndarray:
    """Which of the documents `order` are kept, as indices of it."""
    threshold = plan.options.near_duplicate_threshold
    if threshold >= 1.0:
        return np.arange(len(order))
    has = np.concatenate([np.empty(0, bool), *(part["with_signature"] for part in parts)])
    number = np.cumsum(has) - 1
    table = np.concatenate(
        [np.empty((0, HASHES), np.uint32), *(part["signatures"] for part in parts)]
    )
    rows = [int(number[i]) if has[i] else None for i in order]
    chosen, _ = drop_similar(rows, table, threshold, log)
    return np.array(chosen, np.int64)


def load_decisions(work: Path, counts: list[int]) -> Decisions:
    """The decisions of an earlier attempt. counts: documents of each unit. Raises OSError, and
    ValueError if they belong to other units."""
    values = np.fromfile(work / DECISIONS, np.uint8)
    starts = np.cumsum([0, *counts])
    if len(values) != starts[-1]:
        raise ValueError("another number of documents")
    return Decisions(values, starts)

"""Which sequence of which source a step reads: a pure function of (seed, step).

A run reads its sequences in one endless order, `global_batch` of them per step. `data.skip_steps`
only changes which part of that order a step reads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np

from train.dataset.blend import Blend
from train.dataset.permutation import KeyedPermutation


@dataclass(frozen=True)
class Visits:
    """What sequences of the endless order consist of: parts of the sources' sequences, int64 `[n]`
    each. All but a few are one whole sequence."""

    rows: np.ndarray
    """Which of the given sequences, increasing."""
    sources: np.ndarray
    epochs: np.ndarray
    numbers: np.ndarray
    """Of the sequence within its source."""
    starts: np.ndarray
    """First token of the part within that sequence."""
    lengths: np.ndarray
    """Tokens of the part."""

    def between(self, first: int, end: int) -> "Visits":
        """The parts of the rows `first` to before `end`, which count from 0 again."""
        a, b = np.searchsorted(self.rows, [first, end])
        columns = (getattr(self, field.name)[a:b] for field in fields(self))
        rows, *others = columns
        return Visits(rows - first, *others)


class Order(Protocol):
    def at(self, visits: np.ndarray) -> Visits:
        """The sequences at `visits` (int64, increasing) of the endless order."""
        ...

    def drawn(self, visit: int) -> tuple[int, ...]:
        """How many tokens of each source, with padding, are before `visit`."""
        ...

    def read(self, visit: int) -> list[list[int]]:
        """Which tokens of each source are before `visit`: two orders with the same value have read
        the same, so that one may continue the other. [0, 0] is nothing."""
        ...


MOST_IN_MEMORY = 2**20
"""Sequences of which an epoch's order is held in memory: 8 MiB."""


class ShuffledEpochs:
    """One source, in another order in each epoch: that of `data.source`.

    Of at most MOST_IN_MEMORY sequences the order is numpy's shuffle. It needs 8 bytes per sequence,
    but runs and checkpoints from before keyed permutations have it, and so have all published
    losses. Longer sources have a keyed permutation.
    """

    def __init__(self, count: int, seq_len: int, seed: int) -> None:
        self.count, self.seq_len, self.seed = count, seq_len, seed
        self._epoch: tuple[int, Callable[[np.ndarray], np.ndarray] | None] = (-1, None)

    def at(self, visits: np.ndarray) -> Visits:
        epochs, places = np.divmod(visits, self.count)
        numbers = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            rows = epochs == epoch
            numbers[rows] = self._order(epoch)(places[rows])
        zeros = np.zeros_like(numbers)
        lengths = np.full_like(numbers, self.seq_len)
        return Visits(np.arange(len(visits)), zeros, epochs, numbers, zeros, lengths)

    def drawn(self, visit: int) -> tuple[int, ...]:
        return (visit * self.seq_len,)

    def read(self, visit: int) -> list[list[int]]:
        return [[visit, 0]]

    def _order(self, epoch: int) -> Callable[[np.ndarray], np.ndarray]:
        known, order = self._epoch
        if known == epoch and order is not None:
            return order
        if self.count > MOST_IN_MEMORY:
            order = KeyedPermutation(self.count, self.seed, "", epoch)
        else:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.count).__getitem__
        self._epoch = (epoch, order)
        return order


class BlendedEpochs:
    """Several sources; each epoch of each is in the order of a keyed permutation."""

    def __init__(
        self, blend: Blend, counts: Sequence[int], names: Sequence[str], seed: int
    ) -> None:
        """counts: sequences of each source. names: of the sources, part of the key, so that an
        order depends neither on the other sources nor on their weights."""
        self.blend, self.counts, self.names, self.seed = blend, counts, names, seed
        self._permutations: dict[tuple[int, int], KeyedPermutation] = {}

    def at(self, visits: np.ndarray) -> Visits:
        found = self.blend.at(visits)
        epochs, numbers = np.empty_like(found.draws), np.empty_like(found.draws)
        for source in np.unique(found.sources).tolist():
            rows = np.flatnonzero(found.sources == source)
            epochs[rows], places = np.divmod(found.draws[rows], self.counts[source])
            for epoch in np.unique(epochs[rows]).tolist():
                inside = epochs[rows] == epoch
                numbers[rows[inside]] = self._order(source, epoch)(places[inside])
        return Visits(found.rows, found.sources, epochs, numbers, found.starts, found.lengths)

    def drawn(self, visit: int) -> tuple[int, ...]:
        return self.blend.drawn(visit)

    def read(self, visit: int) -> list[list[int]]:
        return self.blend.read(visit)

    def _order(self, source: int, epoch: int) -> KeyedPermutation:
        known, key = self._permutations, (source, epoch)
        order = known.get(key)
        if order is None:
            order = KeyedPermutation(self.counts[source], self.seed, self.names[source], epoch)
            # replaced, not changed: other threads read it
            current = {k: v for k, v in known.items() if k[0] != source or k[1] == epoch - 1}
            self._permutations = current | {key: order}
        return order


def data_step(step: int, skipped: Sequence[tuple[int, int]]) -> int:
    """The step of the data that training step `step` reads, both from 1; those in the ranges
    `skipped` (first, last; increasing) are not read."""
    for first, last in skipped:
        if step < first:
            break
        step += last - first + 1
    return step

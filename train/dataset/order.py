"""Which sequence of which source a step reads: a pure function of (seed, step).

A run reads its sequences in one endless order, `global_batch` of them per step. `data.skip_steps`
only changes which part of that order a step reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from train.dataset.blend import Blend
from train.dataset.permutation import KeyedPermutation


@dataclass(frozen=True)
class Visits:
    """Sequences to read, int64 `[n]` each."""

    sources: np.ndarray
    epochs: np.ndarray
    numbers: np.ndarray
    """Of the sequence within its source."""


class Order(Protocol):
    def at(self, visits: np.ndarray) -> Visits:
        """The sequences at `visits` (int64, increasing) of the endless order."""
        ...

    def drawn(self, visit: int) -> tuple[int, ...]:
        """How many sequences of each source are before `visit`."""
        ...


class ShuffledEpochs:
    """One source, of which each epoch is a shuffled list: the order of a corpus of `data.source`,
    which has been built in memory anyway."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def at(self, visits: np.ndarray) -> Visits:
        epochs, places = np.divmod(visits, self.count)
        numbers = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            cached, order = self._epoch
            if cached != epoch:
                order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
                self._epoch = (epoch, order)
            rows = epochs == epoch
            numbers[rows] = order[places[rows]]
        return Visits(np.zeros_like(numbers), epochs, numbers)

    def drawn(self, visit: int) -> tuple[int, ...]:
        return (visit,)


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
        sources, draws = self.blend.at(visits)
        epochs, numbers = np.empty_like(draws), np.empty_like(draws)
        for source in np.unique(sources).tolist():
            rows = np.flatnonzero(sources == source)
            epochs[rows], places = np.divmod(draws[rows], self.counts[source])
            for epoch in np.unique(epochs[rows]).tolist():
                inside = epochs[rows] == epoch
                numbers[rows[inside]] = self._order(source, epoch)(places[inside])
        return Visits(sources, epochs, numbers)

    def drawn(self, visit: int) -> tuple[int, ...]:
        return self.blend.drawn(visit)

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

"""Which source each sequence of a blend is from: a closed form of its number, without state.

The sequences of a run are numbered 0, 1, ... over all steps. Of two sources with the shares p and
1 - p, the first has round(n p) of the first n sequences, so sequence i is from it if
round((i + 1) p) > round(i p). Several sources are the leaves of a binary tree (that of Huffman's
code for the weights) in which every node divides its sequences so. All arithmetic is of integers:
weights are the decimal fractions that the experiment gives. Every source has its share of any
number of first sequences within less than two sequences (measured: 1.3), and exactly if the shares
are whole numbers, as with three decimals after 1,000 steps.

A sequence of a packing that leaves padding has fewer tokens, so weights, which count tokens, are
divided by the mean tokens of the source's sequences.

Weights change at given steps, and where a source has been read `max_epochs` times; both begin a new
phase with its own tree.
"""

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import count

import numpy as np

from configs.errors import ConfigError

_MOST_OFF = 2.6
"""Sequences by which a source may be off in any range of sequences: twice the 1.3 above."""


@dataclass(frozen=True)
class Share:
    """A source's part of a blend."""

    label: str
    weights: tuple[tuple[int, float], ...]
    """(First sequence, weight), increasing; the first is 0."""
    tokens_per_sequence: Fraction
    """Mean number of tokens with a loss."""
    limit: int | None
    """Sequences after which it is not read any more."""


@dataclass(frozen=True)
class _Node:
    """Sources below a node: one, or those on the left and on the right."""

    weight: Fraction
    source: int = -1
    left: "_Node | None" = None
    right: "_Node | None" = None


@dataclass(frozen=True)
class _Phase:
    start: int
    """Its first sequence."""
    base: tuple[int, ...]
    """Sequences of each source before it."""
    tree: _Node


class Blend:
    """The source of every sequence, and its number among the sequences of that source."""

    def __init__(self, shares: Sequence[Share], length: int) -> None:
        """length: number of sequences of the run. Raises ConfigError if the sources have fewer."""
        self.shares, self.length = shares, length
        self._phases: list[_Phase] = []
        start, base = 0, (0,) * len(shares)
        while not self._phases or start < length:
            tree = self._tree(start, base)
            if tree is None:
                raise _too_short(shares, start, length)
            self._phases.append(_Phase(start, base, tree))
            start = self._end(self._phases[-1])
            base = self.drawn(start)
        self._starts = [phase.start for phase in self._phases]

    def at(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source, and number of the sequence among those of its source, of each of the sequences
        `numbers` (int64, increasing): both int64."""
        sources, draws = np.empty_like(numbers), np.empty_like(numbers)
        phases = np.searchsorted(self._starts, numbers, side="right") - 1
        for index in np.unique(phases):
            phase = self._phases[index]
            rows = np.flatnonzero(phases == index)
            self._descend(phase, phase.tree, rows, numbers[rows] - phase.start, sources, draws)
        return sources, draws

    def drawn(self, number: int) -> tuple[int, ...]:
        """How many of the first `number` sequences each source has."""
        phase = self._phases[bisect_right([p.start for p in self._phases], number) - 1]
        counts = list(phase.base)
        for source, drawn in _counts(phase.tree, number - phase.start):
            counts[source] += drawn
        return tuple(counts)

    def coarse(self, global_batch: int) -> list[str]:
        """The sources whose share of 1,000 steps may differ by more than 0.1 percent of it from
        their weight, because they have few sequences per step; each with its share."""
        found = []
        for phase in self._phases:
            for leaf in _leaves(phase.tree):
                per_step = leaf.weight / phase.tree.weight * global_batch
                label = self.shares[leaf.source].label
                if (1000 * per_step).denominator != 1 and per_step < _MOST_OFF:
                    found.append(f"{label} {float(per_step):.3g}")
        return list(dict.fromkeys(found))

    def _descend(
        self,
        phase: _Phase,
        node: _Node,
        rows: np.ndarray,
        numbers: np.ndarray,
        sources: np.ndarray,
        draws: np.ndarray,
    ) -> None:
        """Fill `sources` and `draws` at `rows`, which are the sequences `numbers` of `node`."""
        if node.left is None or node.right is None:
            sources[rows] = node.source
            draws[rows] = numbers + phase.base[node.source]
            return
        before, after = _rounded(numbers, node), _rounded(numbers + 1, node)
        goes_left = after > before
        for child, chosen, inside in (
            (node.left, goes_left, before),
            (node.right, ~goes_left, numbers - before),
        ):
            if chosen.any():
                self._descend(phase, child, rows[chosen], inside[chosen], sources, draws)

    def _tree(self, start: int, base: tuple[int, ...]) -> _Node | None:
        """The tree of the sources that are read from sequence `start` on; None if there are
        none."""
        heap = []
        order = count()
        for source, share in enumerate(self.shares):
            weight = [weight for first, weight in share.weights if first <= start][-1]
            if weight and (share.limit is None or base[source] < share.limit):
                node = _Node(Fraction(str(weight)) / share.tokens_per_sequence, source)
                heap.append((node.weight, next(order), node))
        heapq.heapify(heap)
        while len(heap) > 1:
            (small, _, a), (large, _, b) = heapq.heappop(heap), heapq.heappop(heap)
            heapq.heappush(heap, (small + large, next(order), _Node(small + large, -1, b, a)))
        return heap[0][2] if heap else None

    def _end(self, phase: _Phase) -> int:
        """First sequence after the phase."""
        changes = {first for share in self.shares for first, _ in share.weights}
        end = min((first for first in changes if first > phase.start), default=self.length)
        end = max(min(end, self.length), phase.start + 1)
        for source, share in enumerate(self.shares):
            if share.limit is None or phase.base[source] >= share.limit:
                continue
            left = share.limit - phase.base[source]
            low, high = phase.start, end  # the least end at which all of it has been read
            if dict(_counts(phase.tree, high - phase.start)).get(source, 0) < left:
                continue
            while high - low > 1:
                middle = (low + high) // 2
                read = dict(_counts(phase.tree, middle - phase.start)).get(source, 0)
                low, high = (low, middle) if read >= left else (middle, high)
            end = high
        return end


def _rounded(numbers: np.ndarray, node: _Node) -> np.ndarray:
    """Sequences on the left of the node among its first `numbers`, rounded half up."""
    assert node.left is not None
    share = node.left.weight / node.weight
    top, bottom = share.numerator, share.denominator
    if (2 * int(numbers.max(initial=0)) + 2) * bottom < 2**62:
        return (2 * numbers * top + bottom) // (2 * bottom)
    exact = numbers.astype(object)  # Python's integers
    return ((2 * exact * top + bottom) // (2 * bottom)).astype(np.int64)


def _counts(node: _Node, number: int) -> list[tuple[int, int]]:
    """Source and count of each leaf below `node` among the first `number` sequences of it."""
    if node.left is None or node.right is None:
        return [(node.source, number)]
    left = int(_rounded(np.array([number]), node)[0])
    return _counts(node.left, left) + _counts(node.right, number - left)


def _leaves(node: _Node) -> list[_Node]:
    if node.left is None or node.right is None:
        return [node]
    return _leaves(node.left) + _leaves(node.right)


def _too_short(shares: Sequence[Share], start: int, length: int) -> ConfigError:
    names = ", ".join(share.label for share in shares if share.limit is not None)
    return ConfigError(
        f"data.blend: after {start:,} of {length:,} sequences no source is left to read: all "
        f"max_epochs ({names or 'none'}) are read, or the weights are 0; train fewer steps, or "
        "raise max_epochs or a weight"
    )

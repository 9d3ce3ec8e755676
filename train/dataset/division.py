"""Divides a row of items among several receivers in given numbers, evenly: a closed form.

Of two receivers with a and b of every a + b items, the first has round(n a / (a + b)) of the first
n, so item i is its own if round((i + 1) p) > round(i p). Several receivers are the leaves of a
binary tree (that of Huffman's code for the numbers) in which every node divides its items so. All
arithmetic is of integers. The pattern repeats after the sum of all numbers, in every part of the
tree, so any such stretch has each receiver exactly as often as given. Of any first n items a
receiver has its share within less than two (found for random numbers: 1.3).
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count

import numpy as np


@dataclass(frozen=True)
class _Node:
    weight: int
    receiver: int = -1
    """Of a leaf."""
    left: "_Node | None" = None
    right: "_Node | None" = None


class Division:
    """Who receives each of the items 0, 1, 2, ..."""

    def __init__(self, weights: Mapping[int, int]) -> None:
        """weights: of each receiver, how many of every `sum(weights)` items are its own."""
        order = count()
        heap = [(w, next(order), _Node(w, receiver)) for receiver, w in weights.items() if w]
        heapq.heapify(heap)
        while len(heap) > 1:
            (small, _, a), (large, _, b) = heapq.heappop(heap), heapq.heappop(heap)
            heapq.heappush(heap, (small + large, next(order), _Node(small + large, -1, b, a)))
        self._root = heap[0][2]

    def at(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Receiver of each item (int64), and how many items it has before that one."""
        receivers, ranks = np.empty_like(items), np.empty_like(items)
        self._descend(self._root, np.arange(len(items)), items, receivers, ranks)
        return receivers, ranks

    def counts(self, n: int) -> dict[int, int]:
        """How many of the first `n` items each receiver has."""
        found: dict[int, int] = {}
        nodes = [(self._root, n)]
        while nodes:
            node, n = nodes.pop()
            if node.left is None or node.right is None:
                found[node.receiver] = n
                continue
            left = int(_left_of(np.array([n]), node)[0])
            nodes += [(node.left, left), (node.right, n - left)]
        return found

    def _descend(
        self,
        node: _Node,
        rows: np.ndarray,
        items: np.ndarray,
        receivers: np.ndarray,
        ranks: np.ndarray,
    ) -> None:
        """Fill `receivers` and `ranks` at `rows`, which are the items `items` of `node`."""
        if node.left is None or node.right is None:
            receivers[rows], ranks[rows] = node.receiver, items
            return
        before = _left_of(items, node)
        goes_left = _left_of(items + 1, node) > before
        for child, chosen, inside in (
            (node.left, goes_left, before),
            (node.right, ~goes_left, items - before),
        ):
            if chosen.any():
                self._descend(child, rows[chosen], inside[chosen], receivers, ranks)


def _left_of(items: np.ndarray, node: _Node) -> np.ndarray:
    """How many of the first `items` of a node go left: rounded, halves up."""
    assert node.left is not None
    top, bottom = node.left.weight, node.weight
    if bottom >= 2**30:
        items = items.astype(object)  # Python's integers
    whole, rest = items // bottom, items % bottom
    return (whole * top + (2 * rest * top + bottom) // (2 * bottom)).astype(np.int64)

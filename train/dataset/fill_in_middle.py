"""Fill in the middle (Bavarian et al., arXiv:2207.14255): documents as prefix, suffix, middle.

A model that reads the prefix and the suffix before the middle learns to insert text. In each epoch
exactly `round(rate * documents)` documents are rearranged, chosen by a keyed permutation; the two
cuts are drawn per document, epoch and sequence. The three tokens replace the last three of the
document's part in the sequence, so that its length stays. Parts with fewer than _SHORTEST tokens
are not rearranged.
"""

import numpy as np

from kernels.layers.cross_entropy import IGNORE
from train.dataset.permutation import KeyedPermutation

_SHORTEST = 8


class FillInMiddle:
    """Chooses documents of one dataset and rearranges them."""

    def __init__(
        self,
        rate: float,
        tokens: tuple[int, int, int],
        eot: int,
        n_documents: int,
        *,
        seed: int,
        name: str,
    ) -> None:
        """tokens: before prefix, suffix and middle. name: of the dataset, part of the key."""
        self.prefix, self.suffix, self.middle = tokens
        self.eot, self.n_documents, self.seed, self.name = eot, n_documents, seed, name
        self.n_chosen = round(rate * n_documents)
        self._order: tuple[int, KeyedPermutation | None] = (-1, None)

    def chosen(self, documents: np.ndarray, epoch: int) -> np.ndarray:
        """Which of the documents (int64 `[n]`) are rearranged in an epoch, bool `[n]`."""
        known, order = self._order
        if known != epoch or order is None:
            order = KeyedPermutation(self.n_documents, self.seed, "fim", self.name, epoch)
            self._order = (epoch, order)
        return order(documents) < self.n_chosen

    def rearrange(self, tokens: np.ndarray, targets: np.ndarray, start: int, epoch: int) -> None:
        """Rearrange the part of a document in one sequence, in place; int64 `[n]` both.

        start: its first token's number in the dataset, for the cuts.
        """
        body = tokens[int(tokens[0] == self.eot) :]
        length = len(body) - 3
        if length + 3 < _SHORTEST:
            return
        key = [self.seed, epoch, start]
        first, second = np.sort(np.random.default_rng(key).integers(0, length + 1, 2)).tolist()
        prefix, suffix, middle = np.array([[self.prefix], [self.suffix], [self.middle]])
        parts = [
            prefix, body[:first], suffix, body[second:length], middle, body[first:second],
        ]  # fmt: skip
        body[:] = np.concatenate(parts)
        # the middle ends where the document ended, unless its rest is in another sequence
        targets[-1] = self.eot if targets[-1] == self.eot else IGNORE
        targets[:-1] = tokens[1:]

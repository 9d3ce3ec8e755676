"""The tokens of a step: a pure function of (seed, step), for any number of ranks.

The corpus is one long row of tokens in which an end-of-text token begins every document. It is cut
into sequences of `seq_len`, which each epoch reads in a seeded random order. Step s reads the next
`global_batch` of them; microbatch m of rank r reads a fixed share. Only the step must be stored for
a resume, and the number of ranks may change without changing the data.

Targets are the next tokens. The target of a document's last token is therefore the end-of-text
token, which then begins the next document at position 0 and does not attend to earlier tokens.

B sequences, L their length, T = B * L tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.documents import DocumentAttention


@dataclass(frozen=True)
class Batch:
    """One microbatch of one rank, on its device."""

    tokens_T: Tensor
    positions_T: Tensor
    targets_T: Tensor
    core: DocumentAttention
    n_targets: int
    """Targets with a loss; counted on the host."""

    def to(self, device: torch.device) -> "Batch":
        return Batch(
            self.tokens_T.to(device, non_blocking=True),
            self.positions_T.to(device, non_blocking=True),
            self.targets_T.to(device, non_blocking=True),
            self.core.to(device),
            self.n_targets,
        )


class Sequences:
    """Sequences of a token row, by number, with their positions and targets."""

    def __init__(self, tokens: np.ndarray, seq_len: int, eot: int) -> None:
        self.tokens, self.seq_len, self.eot = tokens, seq_len, eot
        self.count = max((len(tokens) - 1) // seq_len, 0)

    def batch(self, numbers: np.ndarray) -> Batch:
        """The sequences `numbers` (int, `[B]`) as one microbatch."""
        starts = numbers.astype(np.int64)[:, None] * self.seq_len
        window = self.tokens[starts + np.arange(self.seq_len + 1)].astype(np.int64)
        tokens_BL, targets_BL = window[:, :-1], window[:, 1:]
        index_L = np.arange(self.seq_len)
        opened_BL = np.where(tokens_BL == self.eot, index_L, 0)
        positions_BL = torch.from_numpy(index_L - np.maximum.accumulate(opened_BL, axis=1))
        return Batch(
            torch.from_numpy(tokens_BL.reshape(-1)),
            positions_BL.reshape(-1),
            torch.from_numpy(targets_BL.reshape(-1)),
            DocumentAttention(positions_BL),
            targets_BL.size,
        )

    def first(self) -> Batch:
        """The first sequence alone, to run when a rank has no sequences left."""
        return self.batch(np.zeros(1, np.int64))


class TrainingData:
    """The microbatches of every step, for one rank of `n_ranks`."""

    def __init__(
        self,
        sequences: Sequences,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        n_ranks: int,
    ) -> None:
        self.sequences, self.seed = sequences, seed
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.n_ranks = rank, n_ranks
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def step(self, step: int) -> Iterator[Batch]:
        """The microbatches of optimizer step `step` (counted from 1), in order."""
        per_pass = self.micro_batch * self.n_ranks
        first = (step - 1) * self.global_batch + self.rank * self.micro_batch
        for start in range(first, first + self.global_batch - per_pass + 1, per_pass):
            numbers = [self._number(i) for i in range(start, start + self.micro_batch)]
            yield self.sequences.batch(np.array(numbers))

    def _number(self, visit: int) -> int:
        """The sequence at index `visit` of the endless stream of epochs."""
        epoch, place = divmod(visit, self.sequences.count)
        if self._epoch[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.sequences.count)
            self._epoch = (epoch, order)
        return int(self._epoch[1][place])


def validation_batches(
    sequences: Sequences, limit: int, micro_batch: int, rank: int, n_ranks: int
) -> Iterator[Batch | None]:
    """This rank's share of the first `limit` held-out sequences (0: all).

    All ranks get the same number of items, since they exchange rows in the forward pass; a rank
    without sequences gets None and repeats work that is not counted.
    """
    count = min(limit, sequences.count) if limit else sequences.count
    for start in range(0, count, micro_batch * n_ranks):
        mine = np.arange(start, count)[rank * micro_batch : (rank + 1) * micro_batch]
        yield sequences.batch(mine) if len(mine) else None

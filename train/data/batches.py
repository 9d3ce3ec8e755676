"""The microbatches of a step: a pure function of (seed, step), for any number of ranks.

A run reads its sequences in one endless order (`train.dataset.order`). Step s reads the next
`global_batch` of them; microbatch m of rank r reads a fixed share. Only the step must be stored for
a resume, and the number of ranks may change without changing the data.

B sequences, L their length, T = B * L tokens.
"""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from kernels.layers.cross_entropy import IGNORE
from models.documents import DocumentAttention
from train.dataset.order import Order, ShuffledEpochs, Visits, data_step
from train.dataset.sequences import Rows, Sequences


@dataclass(frozen=True)
class Batch:
    """One microbatch of one rank, on its device."""

    tokens_T: Tensor
    positions_T: Tensor
    targets_T: Tensor
    core: DocumentAttention
    n_targets: int
    """Targets with a loss; counted on the host."""
    sources: tuple[tuple[int, int, int], ...] = ()
    """Source, tokens and targets with a loss of each part, one after another."""
    losses_T: Tensor | None = field(default=None, compare=False)
    """The loss of every token, fp32, written by the forward pass; None: not recorded."""

    def to(self, device: torch.device, *, with_losses: bool = False) -> "Batch":
        """A copy on another device. with_losses: record the loss of every token."""
        losses_T = None
        if with_losses:
            losses_T = torch.zeros(len(self.tokens_T), dtype=torch.float32, device=device)
        return replace(
            self,
            tokens_T=self.tokens_T.to(device, non_blocking=True),
            positions_T=self.positions_T.to(device, non_blocking=True),
            targets_T=self.targets_T.to(device, non_blocking=True),
            core=self.core.to(device),
            losses_T=losses_T,
        )


def make_batch(parts: Sequence[tuple[Sequence[tuple[int, int]], Rows]], pin: bool = False) -> Batch:
    """The sequences of one or more sources as one microbatch.

    parts: sequences, and the sources of their tokens: (source, number of tokens), one after
    another. pin: in page-locked memory, from which CUDA copies while it computes.
    """
    tokens_BL, targets_BL, positions_BL = (
        _tensor([getattr(rows, name) for _, rows in parts], pin)
        for name in ("tokens_BL", "targets_BL", "positions_BL")
    )
    sources = []
    for owners, rows in parts:
        has_loss, at = rows.targets_BL.reshape(-1) != IGNORE, 0
        for source, n in owners:
            sources.append((source, n, int(np.count_nonzero(has_loss[at : at + n]))))
            at += n
    return Batch(
        tokens_BL.reshape(-1),
        positions_BL.reshape(-1),
        targets_BL.reshape(-1),
        DocumentAttention(positions_BL),
        sum(n for _, _, n in sources),
        tuple(sources),
    )


def _tensor(arrays: list[np.ndarray], pin: bool) -> Tensor:
    joined = np.ascontiguousarray(arrays[0] if len(arrays) == 1 else np.concatenate(arrays))
    tensor = torch.from_numpy(joined)
    return tensor.pin_memory() if pin else tensor


class TrainingData:
    """The microbatches of every step, for one rank of `n_ranks`."""

    def __init__(
        self,
        order: Order,
        sources: Sequence[Sequences],
        *,
        global_batch: int,
        micro_batch: int,
        rank: int,
        n_ranks: int,
        skipped: Sequence[tuple[int, int]] = (),
        pin: bool = False,
    ) -> None:
        """skipped: first and last of each range of steps whose data is not read. pin: see
        `make_batch`."""
        self.order, self.sources, self.skipped, self.pin = order, sources, skipped, pin
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.n_ranks = rank, n_ranks

    def step(self, step: int) -> Iterator[Batch]:
        """The microbatches of optimizer step `step` (counted from 1), in order."""
        visits = self.visits(step)
        for pass_ in range(self._passes):
            yield self._batch(visits, pass_)

    def ahead(
        self, first: int, last: int, workers: int = 1, prefetch: int = 2
    ) -> Generator[list[Batch], None, None]:
        """The microbatches of the steps `first` to `last`, a list per step.

        workers: threads that prepare them, each one microbatch at a time; 0: the caller does.
        prefetch: steps to prepare ahead. Close the iterator to end the threads.
        """
        if not workers:
            for step in range(first, last + 1):
                yield list(self.step(step))
            return
        pending: deque[list[Future[Batch]]] = deque()
        following = iter(range(first, last + 1))
        pool = ThreadPoolExecutor(workers, thread_name_prefix="data")
        try:
            for _ in range(first, last + 1):
                while len(pending) <= prefetch and (coming := next(following, None)) is not None:
                    visits = self.visits(coming)
                    pending.append(
                        [pool.submit(self._batch, visits, n) for n in range(self._passes)]
                    )
                yield [future.result() for future in pending.popleft()]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    @property
    def _passes(self) -> int:
        return self.global_batch // (self.micro_batch * self.n_ranks)

    def visits(self, step: int) -> Visits:
        """This rank's sequences of a step, microbatch after microbatch."""
        per_pass = self.micro_batch * self.n_ranks
        first = (data_step(step, self.skipped) - 1) * self.global_batch
        first += self.rank * self.micro_batch
        starts = np.arange(self._passes, dtype=np.int64)[:, None] * per_pass + first
        return self.order.at((starts + np.arange(self.micro_batch)).reshape(-1))

    def _batch(self, visits: Visits, pass_: int) -> Batch:
        here = visits.between(pass_ * self.micro_batch, (pass_ + 1) * self.micro_batch)
        parts: list[tuple[list[tuple[int, int]], Rows]] = []
        whole = np.bincount(here.rows)[here.rows] == 1
        for source in np.unique(here.sources[whole]).tolist():
            chosen = whole & (here.sources == source)
            rows = self.sources[source].rows(here.numbers[chosen], here.epochs[chosen])
            parts.append(([(source, rows.tokens_BL.size)], rows))
        for row in np.unique(here.rows[~whole]).tolist():
            parts.append(self._shared(here.between(row, row + 1)))
        return make_batch(parts, self.pin)

    def _shared(self, visits: Visits) -> tuple[list[tuple[int, int]], Rows]:
        """The sources and the tokens of a sequence of several parts."""
        owners, found = [], []
        for source, epoch, number, start, length in zip(
            visits.sources.tolist(), visits.epochs, visits.numbers, visits.starts.tolist(),
            visits.lengths.tolist(), strict=True,
        ):  # fmt: skip
            rows = self.sources[source].rows(np.array([number]), np.array([epoch]))
            owners.append((source, length))
            found.append(rows.cut(start, start + length))
        return owners, Rows.joined(found)


def shuffled_epochs(
    sequences: Sequences, *, seed: int, global_batch: int, micro_batch: int, rank: int, n_ranks: int
) -> TrainingData:
    """The microbatches of one source."""
    return TrainingData(
        ShuffledEpochs(sequences.count, sequences.seq_len, seed), [sequences],
        global_batch=global_batch, micro_batch=micro_batch, rank=rank, n_ranks=n_ranks,
    )  # fmt: skip


def sequence_batch(sequences: Sequences, numbers: np.ndarray) -> Batch:
    """The sequences `numbers` (int, `[B]`) of one source as one microbatch."""
    numbers = numbers.astype(np.int64)
    rows = sequences.rows(numbers, np.zeros_like(numbers))
    return make_batch([([(0, rows.tokens_BL.size)], rows)])


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
        yield sequence_batch(sequences, mine) if len(mine) else None

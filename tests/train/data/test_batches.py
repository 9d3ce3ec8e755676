"""Data order: every mesh trains on the same sequences; positions and targets are checked by
hand."""

import numpy as np
import pytest
import torch

from models.attention import Layer
from train.data.batches import (
    Batch,
    TrainingData,
    sequence_batch,
    shuffled_epochs,
    validation_batches,
)
from train.dataset.sequences import sequences_of

SEQUENCES = sequences_of(np.arange(1, 1 + 4 * 23 + 1).astype(np.uint16), 4, eot=0)  # 23 of 4


def data(rank: int, n_ranks: int, micro_batch: int, seed: int = 3) -> TrainingData:
    return shuffled_epochs(
        SEQUENCES, seed=seed, global_batch=12, micro_batch=micro_batch, rank=rank, n_ranks=n_ranks
    )


def batch(tokens: list[int], *numbers: int) -> Batch:
    sequences = sequences_of(np.array(tokens, dtype=np.uint16), 4, eot=0)
    return sequence_batch(sequences, np.array(numbers))


def first_tokens(step: int, n_ranks: int, micro_batch: int) -> list[int]:
    seen: list[int] = []
    for rank in range(n_ranks):
        for batch in data(rank, n_ranks, micro_batch).step(step):
            assert len(batch.tokens_T) == 4 * micro_batch
            seen += batch.tokens_T[::4].tolist()
    return seen


@pytest.mark.parametrize(("n_ranks", "micro"), [(1, 3), (2, 1), (2, 6), (3, 4), (4, 3)])
def test_a_step_sees_the_same_sequences_on_every_mesh(n_ranks: int, micro: int) -> None:
    for step in (1, 2, 3, 40):
        assert sorted(first_tokens(step, n_ranks, micro)) == sorted(first_tokens(step, 1, 12))


def test_an_epoch_visits_every_sequence_once_in_another_order() -> None:
    stream = [t for step in range(1, 24) for t in first_tokens(step, 1, 12)]
    epochs = [stream[i : i + 23] for i in range(0, 23 * 12, 23)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_positions_restart_and_targets_are_the_next_tokens() -> None:
    found = batch([0, 5, 6, 0, 7, 0, 8, 9, 0], 0, 1)
    assert found.tokens_T.tolist() == [0, 5, 6, 0, 7, 0, 8, 9]
    assert found.targets_T.tolist() == [5, 6, 0, 7, 0, 8, 9, 0]
    assert found.positions_T.tolist() == [0, 1, 2, 0, 0, 0, 1, 2]
    mask = found.core.mask(Layer(0, 1.0))
    assert mask is not None
    assert mask[1].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]


def test_without_a_boundary_inside_there_is_no_mask() -> None:
    assert batch([0, 1, 2, 3, 4], 0).core.mask(Layer(0, 1.0)) is None


@pytest.mark.parametrize("limit", [0, 1, 7, 100])
@pytest.mark.parametrize(("n_ranks", "micro"), [(1, 4), (2, 3), (3, 1), (4, 8)])
def test_validation_counts_every_sequence_once(limit: int, n_ranks: int, micro: int) -> None:
    shares = [list(validation_batches(SEQUENCES, limit, micro, r, n_ranks)) for r in range(n_ranks)]
    assert len({len(share) for share in shares}) == 1, "collectives must match"
    seen = [t for share in shares for b in share if b is not None for t in b.tokens_T[::4].tolist()]
    count = min(limit, 23) if limit else 23
    assert sorted(seen) == [1 + 4 * i for i in range(count)]


def test_batches_move_with_their_core() -> None:
    assert batch([0, 1, 0, 3, 4], 0).to(torch.device("cpu")).core.mask(Layer(0, 1.0)) is not None

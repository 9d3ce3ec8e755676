"""A million samples with interruptions, other numbers of ranks and workers: none twice, none lost.

Each sample is one sequence of a dataset, and its tokens are its number. Of the blend some sequences
are shared: half of one source's sample and half of another's.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
import pytest

from train.data.batches import Batch, TrainingData
from train.dataset.blend import Blend, Share
from train.dataset.order import BlendedEpochs
from train.dataset.prepared import Split
from train.dataset.sequences import Concatenated, TokenRules
from train.dataset.tokens import ArrayTokens

WORLDS = (1, 4, 3, 2, 6)
L = 2


def source(count: int, first: int, length: int = L) -> Concatenated:
    """`count` sequences; all tokens of sequence i are `first + i`."""
    tokens = np.repeat(np.arange(first, first + count + 1), length)[: count * length + 1]
    return Concatenated(
        Split(ArrayTokens(tokens.astype(np.uint32), "samples"), 0, lambda: np.zeros(1, np.int64)),
        length, TokenRules(2**31, True, 2**32),
    )  # fmt: skip


def data_of(rank: int, world: int, steps: int, global_batch: int, counts: tuple[int, int],
            skipped: tuple[tuple[int, int], ...] = ()) -> TrainingData:  # fmt: skip
    """A blend of two sources; everything is opened anew, as in another process."""
    sources = [source(counts[0], 0), source(counts[1], counts[0])]
    shares = [
        Share(n, ((0, w),), Fraction(1), None) for n, w in (("a", 0.3701396), ("b", 0.6298604))
    ]
    blend = Blend(shares, (steps + 100) * global_batch, global_batch=global_batch, seq_len=L)
    return TrainingData(
        BlendedEpochs(blend, counts, ("a", "b"), seed=7), sources, global_batch=global_batch,
        micro_batch=global_batch // world // (2 if world < 4 else 1), rank=rank, n_ranks=world,
        skipped=skipped,
    )  # fmt: skip


def step_of_all_ranks(iterators: Sequence[Iterator[list[Batch]]]) -> list[int]:
    """The tokens of the next step of all ranks, sorted: their order has no effect."""
    of_ranks = [next(iterator) for iterator in iterators]
    found: list[int] = []
    for microbatches in zip(*of_ranks, strict=True):
        for batch in microbatches:
            found += batch.tokens_T.tolist()
    return sorted(found)


def run(steps: int, global_batch: int, counts: tuple[int, int], interruptions: int, seed: int
        ) -> tuple[str, np.ndarray]:  # fmt: skip
    """A hash of the samples of every step, and how many tokens of each were read, in a run that is
    interrupted and continues with other ranks, workers and numbers of steps ahead."""
    rng = random.Random(seed)
    chosen: set[int] = set()
    while len(chosen) < interruptions:  # the first three directly after one another
        first = rng.randrange(1, steps - 3)
        chosen |= {first, first + 1, first + 2} if not chosen else {first}
    stops = [*sorted(chosen), steps]
    digest, times = hashlib.sha256(), np.zeros(sum(counts), np.int64)
    done = 0
    for attempt, stop in enumerate(stops):
        world = WORLDS[attempt % len(WORLDS)]
        workers, ahead = (rng.choice((0, 2)), rng.randint(1, 4)) if interruptions else (0, 1)
        iterators = [
            data_of(rank, world, steps, global_batch, counts).ahead(done + 1, steps, workers, ahead)
            for rank in range(world)
        ]
        while done < stop:
            found = step_of_all_ranks(iterators)
            assert len(found) == global_batch * L
            digest.update(np.array(found).tobytes())
            np.add.at(times, found, 1)
            done += 1
        for iterator in iterators:
            iterator.close()  # steps that were prepared ahead are lost with the process
    return digest.hexdigest(), times


def check(n_samples: int, global_batch: int, counts: tuple[int, int], interruptions: int) -> None:
    steps = n_samples // global_batch
    whole, once = run(steps, global_batch, counts, 0, seed=0)
    found, times = run(steps, global_batch, counts, interruptions, seed=1)
    assert found == whole
    assert (times == once).all() and times.sum() == steps * global_batch * L
    for first, count in ((0, counts[0]), (counts[0], counts[1])):
        # of each source, every sample as often as epochs, or once more; but one, which the shared
        # sequences of 1,000 steps read, waits for them, or is read in parts
        part = times[first : first + count]
        epochs = part.sum() // (count * L)
        assert epochs >= 1
        others = [n for n in part.tolist() if n not in (epochs * L, (epochs + 1) * L)]
        assert len(others) <= 1 and all(n >= (epochs - 1) * L for n in others)


def test_interrupted_runs_read_what_an_uninterrupted_one_reads() -> None:
    check(n_samples=16_800, global_batch=240, counts=(1_403, 7_701), interruptions=12)


@pytest.mark.slow
def test_a_million_samples_and_a_hundred_interruptions() -> None:
    check(n_samples=1_000_800, global_batch=1200, counts=(150_001, 400_003), interruptions=100)


def test_skipped_steps_are_not_read_whatever_the_ranks() -> None:
    steps, batch, counts = 20, 24, (101, 307)
    whole = [
        step_of_all_ranks([data_of(0, 1, 30, batch, counts).ahead(step, step, 0)])
        for step in range(1, 31)
    ]
    for world in (1, 2, 3):
        iterators = [
            data_of(r, world, 30, batch, counts, ((4, 6), (11, 11))).ahead(1, steps, 2, 3)
            for r in range(world)
        ]
        found = [step_of_all_ranks(iterators) for _ in range(steps)]
        assert found == [*whole[:3], *whole[6:10], *whole[11:24]]

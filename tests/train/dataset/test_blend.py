"""Random blends, counted token by token: small batches, many sources, changes, limits, padding."""

import random
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from tests.train.dataset.test_resume_of_samples import source, step_of_all_ranks
from train.data.batches import TrainingData
from train.dataset.blend import STEPS, Blend, Share
from train.dataset.order import BlendedEpochs


def random_shares(rng: random.Random, length: int, global_batch: int) -> list[Share]:
    n = rng.randint(1, 9)
    endless = rng.randrange(n)
    shares = []
    for number in range(n):
        weights = [(0, round(rng.random() ** 3 + 2e-3, rng.randint(3, 9)))]
        if rng.random() < 0.4:
            step = rng.randint(1, length // global_batch)
            weights.append((step * global_batch, round(rng.random() + 0.01, 3)))
        has_limit = number != endless and rng.random() < 0.7
        limit = rng.randint(1, length // 2) if has_limit else None
        padding = Fraction(rng.randint(50, 100), 100) if rng.random() < 0.5 else Fraction(1)
        shares.append(Share(str(number), tuple(weights), padding, limit))
    return shares


def counted(blend: Blend, length: int, seq_len: int) -> np.ndarray:
    """Tokens of each source in the first 0, 1, ... sequences, `[sources, length + 1]`; checks that
    no token of a source is read twice, and which are not read."""
    found = blend.at(np.arange(length))
    assert (np.bincount(found.rows, found.lengths, minlength=length) == seq_len).all()
    tokens = np.zeros((len(blend.shares), length + 1), np.int64)
    np.add.at(tokens, (found.sources, found.rows + 1), found.lengths)
    for number, share in enumerate(blend.shares):
        chosen = found.sources == number
        n_begun = int(found.draws[chosen].max(initial=-1)) + 1
        assert share.limit is None or n_begun <= share.limit
        times = np.zeros((n_begun, seq_len + 1), np.int64)
        np.add.at(times, (found.draws[chosen], found.starts[chosen]), 1)
        ends = found.starts[chosen] + found.lengths[chosen]
        np.add.at(times, (found.draws[chosen], ends), -1)
        times = np.cumsum(times, axis=1)[:, :-1]
        assert times.max(initial=0) <= 1
        assert (times == 0).sum() < 2 * seq_len  # of sequences that are read later
    return np.cumsum(tokens, axis=1)


def tokens_before(blend: Blend, n: int, seq_len: int) -> list[set[int]]:
    """The tokens of each source that are in the first `n` sequences."""
    found = blend.at(np.arange(n)) if n else blend.at(np.arange(0, 1))
    sets: list[set[int]] = [set() for _ in blend.shares]
    places = found.draws * seq_len + found.starts
    for number, place, length in zip(found.sources, places, found.lengths, strict=True):
        sets[number].update(range(place, place + length * bool(n)))
    return sets


def described(read: list[list[int]], seq_len: int) -> list[set[int]]:
    """The tokens that a state stands for."""
    sets = []
    for begun, tokens, *still in read:
        sequences = [n for n in range(begun) if n not in still]
        sets.append({n * seq_len + i for n in sequences for i in range(seq_len)})
        sets[-1].update(still[0] * seq_len + i for i in range(tokens if still else 0))
    return sets


@pytest.mark.parametrize("seed", range(10))
def test_any_thousand_steps_have_each_share_to_the_token(seed: int) -> None:
    rng = random.Random(seed)
    global_batch, seq_len = rng.choice((1, 2, 3)), rng.choice((2, 7, 32))
    length = int(STEPS * global_batch * rng.choice((1.3, 2.2, 3.1)))
    shares = random_shares(rng, length, global_batch)
    blend = Blend(shares, length, global_batch=global_batch, seq_len=seq_len)
    tokens = counted(blend, length, seq_len)
    for n in (0, 1, length, rng.randint(0, length)):
        assert blend.drawn(n) == tuple(tokens[:, n])
        assert tokens_before(blend, n, seq_len) == described(blend.read(n), seq_len)
    some = np.array(sorted(rng.sample(range(length), 40)))
    for row, number in enumerate(some.tolist()):
        together, alone = blend.at(some), blend.at(np.array([number]))
        assert (together.draws[together.rows == row] == alone.draws).all()
    changes = sorted({first for share in shares for first, _ in share.weights} | {length})
    for start, end in pairwise(changes):
        read = tokens[:, start : end + 1]
        # sources that end here or have ended leave their share to the others at some sequence
        if any(share.limit and read[i, -1] // seq_len + 3 > share.limit
               for i, share in enumerate(shares)):  # fmt: skip
            continue
        weights = [
            Fraction(str([w for first, w in share.weights if first <= start][-1]))
            / share.tokens_per_sequence
            for share in shares
        ]
        period = STEPS * global_batch
        for i, weight in enumerate(weights):
            part = weight / sum(weights)
            expected = np.arange(end - start + 1) * float(part) * seq_len
            assert np.abs(read[i] - read[i, 0] - expected).max() < 2.5 * seq_len
            if end - start >= period:
                windows = read[i, period:] - read[i, :-period]
                assert len(set(windows.tolist())) == 1
                assert abs(windows[0] - float(part * period * seq_len)) < 1


def test_as_many_tokens_are_not_the_same_tokens() -> None:
    """A weight that is a little smaller: the first sequence is then one that is read in parts."""
    blends = []
    for weight in (0.5, 0.4999):
        shares = [Share(str(w), ((0, w),), Fraction(1), None) for w in (weight, 1 - weight)]
        blends.append(Blend(shares, 4000, global_batch=8, seq_len=32))
    one, other = blends
    assert one.drawn(16) == other.drawn(16) and one.read(16) != other.read(16)
    both = [tokens_before(blend, 16, 32) for blend in blends]
    assert both[0] != both[1]


def test_eight_sources_and_two_sequences_a_step() -> None:
    """Weights of a real blend, also after one source has ended."""
    weights = (0.4037, 0.25, 0.2, 0.0811, 0.0412, 0.015, 0.006, 0.003)
    limits = (None, None, None, None, 90, None, None, None)
    shares = [Share(str(w), ((0, w),), Fraction(1), limit)
              for w, limit in zip(weights, limits, strict=True)]  # fmt: skip
    length = 9000
    blend = Blend(shares, length, global_batch=2, seq_len=256)
    tokens = counted(blend, length, 256)
    assert 89 * 256 < tokens[4, -1] <= 90 * 256
    end = int(np.flatnonzero(np.diff(tokens[4]))[-1]) + 2
    assert end < 2400
    windows = tokens[:, end + 2000 :] - tokens[:, end:-2000]
    for number, weight in enumerate(weights):
        if number == 4:
            continue
        expected = 2000 * 256 * weight / (sum(weights) - weights[4])
        assert np.abs(windows[number] - expected).max() < 1
        assert np.abs(windows[number] / expected - 1).max() < 0.001


def test_shared_sequences_have_the_tokens_of_their_parts() -> None:
    """Consecutive tokens of a source with their own targets; positions begin with each part."""
    seq_len, counts, steps = 8, (150, 700, 40), 1000
    sources = [source(n, 10_000 * i, seq_len) for i, n in enumerate(counts)]
    shares = [Share(str(w), ((0, w),), Fraction(1), limit)
              for w, limit in ((0.1378, None), (0.8287, None), (0.0335, 40))]  # fmt: skip
    blend = Blend(shares, steps, global_batch=1, seq_len=seq_len)
    shared = np.flatnonzero(np.bincount(blend.at(np.arange(steps)).rows) > 1)
    assert len(shared) >= 2
    data = TrainingData(
        BlendedEpochs(blend, counts, ("a", "b", "c"), 0), sources, global_batch=1, micro_batch=1,
        rank=0, n_ranks=1,
    )  # fmt: skip
    for row in shared.tolist():
        (batch,) = data.step(row + 1)
        at = 0
        assert sum(n for _, n, _ in batch.sources) == seq_len and batch.n_targets == seq_len
        for number, n, n_targets in batch.sources:
            part = batch.tokens_T[at : at + n]
            assert (part // 10_000 == number).all() and n_targets == n
            assert batch.positions_T[at : at + n].tolist() == list(range(n))
            assert (batch.targets_T[at : at + n] - part <= 1).all()
            at += n


def test_ranks_share_a_batch_with_shared_sequences() -> None:
    counts, batch = (90, 300), 12
    shares = [Share(str(w), ((0, w),), Fraction(1), None) for w in (0.23131, 0.76869)]

    def data(rank: int, world: int) -> TrainingData:
        blend = Blend(shares, 1000 * batch, global_batch=batch, seq_len=2)
        return TrainingData(
            BlendedEpochs(blend, counts, ("a", "b"), 0), [source(90, 0), source(300, 90)],
            global_batch=batch, micro_batch=2, rank=rank, n_ranks=world,
        )  # fmt: skip

    numbers = data(0, 1).order.at(np.arange(12_000))
    (shared,) = np.flatnonzero(np.bincount(numbers.rows) > 1).tolist()
    first = shared // batch
    whole = [step_of_all_ranks([data(0, 1).ahead(s, s, 0)]) for s in (first, first + 1, first + 2)]
    for world in (2, 3, 6):
        iterators = [data(r, world).ahead(first, first + 2, 2, 3) for r in range(world)]
        assert [step_of_all_ranks(iterators) for _ in range(3)] == whole

"""Which sequences a step reads: permutations, blends, skipped steps. Compared with counting."""

import random
from fractions import Fraction

import numpy as np
import pytest

from configs.errors import ConfigError
from train.dataset.blend import Blend, Share
from train.dataset.order import BlendedEpochs, ShuffledEpochs, data_step
from train.dataset.permutation import KeyedPermutation


def share(label: str, weight: float, limit: int | None = None, tokens: float = 1) -> Share:
    return Share(label, ((0, weight),), Fraction(str(tokens)), limit)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 16, 17, 100, 1023, 1025, 65_537])
def test_a_permutation_has_every_item_once(count: int) -> None:
    places = np.arange(count)
    orders = [KeyedPermutation(count, seed, "web", epoch)(places) for seed, epoch in
              ((0, 0), (0, 1), (1, 0))]  # fmt: skip
    for order in orders:
        assert (np.sort(order) == places).all()
    if count > 10:
        assert not (orders[0] == orders[1]).all() and not (orders[0] == orders[2]).all()


def test_a_permutation_is_computed_item_by_item() -> None:
    whole = KeyedPermutation(1000, 5)(np.arange(1000))
    chosen = np.array([999, 3, 3, 0])
    assert (KeyedPermutation(1000, 5)(chosen) == whole[chosen]).all()
    large = KeyedPermutation(2**61, 5)(np.array([0, 2**61 - 1, 2**60]))
    assert len(set(large.tolist())) == 3 and ((large >= 0) & (large < 2**61)).all()


def test_orders_of_small_permutations_are_equally_frequent() -> None:
    """Chi-squared over the 24 orders of 4 items: 99.9 percent of fair draws are below 49.7."""
    draws = [tuple(KeyedPermutation(4, key)(np.arange(4))) for key in range(6000)]
    counts = np.unique(np.array(draws), axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts - 250) ** 2 / 250).sum() < 49.7


def test_neighbors_of_a_permutation_are_independent() -> None:
    order = KeyedPermutation(10_000, 1)(np.arange(10_000)).astype(float)
    for lag in (1, 2, 64, 4096):
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < 0.04


@pytest.mark.parametrize("seed", range(12))
def test_any_first_sequences_of_a_blend_have_their_shares(seed: int) -> None:
    rng = random.Random(seed)
    weights = [round(rng.random() ** 3 + 1e-4, rng.randint(4, 9)) for _ in range(rng.randint(1, 9))]
    length = 5000
    blend = Blend([share(str(i), w) for i, w in enumerate(weights)], length)
    sources, draws = blend.at(np.arange(length))
    for source, weight in enumerate(weights):
        count = np.cumsum(sources == source)
        expected = np.arange(1, length + 1) * weight / sum(weights)
        assert np.abs(count - expected).max() < 1.4
        assert (draws[sources == source] == np.arange(count[-1])).all()
    for number in (0, 1, 17, length):
        assert blend.drawn(number) == tuple(np.bincount(sources[:number], minlength=len(weights)))
    some = np.array([0, 3, 777, 4999])
    assert (blend.at(some)[0] == sources[some]).all() and (blend.at(some)[1] == draws[some]).all()


def test_weights_of_three_decimals_are_exact_over_any_thousand_steps() -> None:
    weights, global_batch = (0.617, 0.283, 0.099, 0.001), 8
    blend = Blend([share(str(w), w) for w in weights], 3000 * global_batch)
    sources, _ = blend.at(np.arange(3000 * global_batch))
    for source, weight in enumerate(weights):
        count = np.concatenate([[0], np.cumsum(sources == source)])
        windows = count[1000 * global_batch :] - count[: -1000 * global_batch]
        assert (windows == round(1000 * global_batch * weight)).all()


def test_weights_change_at_their_sequence() -> None:
    shares = [Share("a", ((0, 1.0), (600, 3.0)), Fraction(1), None), share("b", 1.0)]
    blend = Blend(shares, 1000)
    assert blend.drawn(600) == (300, 300)
    assert blend.drawn(1000) == (600, 400)


def test_a_source_is_read_max_epochs_times_and_then_the_others() -> None:
    blend = Blend([share("a", 0.5, limit=100), share("b", 0.25), share("c", 0.25)], 1000)
    sources, draws = blend.at(np.arange(1000))
    assert (sources == 0).sum() == 100 and draws[sources == 0].max() == 99
    last = np.flatnonzero(sources == 0)[-1]
    assert 198 <= last <= 200
    assert blend.drawn(1000)[1:] == (450, 450)


def test_a_blend_that_ends_too_early_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"after 130 of 131 sequences.*\(a, b\)"):
        Blend([share("a", 0.5, limit=100), share("b", 0.5, limit=30)], 131)
    Blend([share("a", 0.5, limit=100), share("b", 0.5, limit=30)], 130)
    with pytest.raises(ConfigError, match="after 50 of 60"):
        Blend([Share("a", ((0, 1.0), (50, 0.0)), Fraction(1), None)], 60)


def test_weights_count_tokens_where_sequences_have_padding() -> None:
    blend = Blend([share("full", 0.5, tokens=100), share("half", 0.5, tokens=50)], 3000)
    full, half = blend.drawn(3000)
    assert abs(full * 100 - half * 50) <= 150


def test_an_epoch_of_a_blend_has_every_sequence_once_and_no_other_source_changes_it() -> None:
    def order(weights: tuple[float, float], seed: int = 3) -> list[tuple[int, int, int]]:
        shares = [share("a", weights[0]), share("b", weights[1])]
        order = BlendedEpochs(Blend(shares, 4000), (70, 301), ("a", "b"), seed)
        found = order.at(np.arange(4000))
        return list(zip(found.sources.tolist(), found.epochs.tolist(), found.numbers.tolist(),
                        strict=True))  # fmt: skip

    found = order((0.4, 0.6))
    of_a = [(epoch, number) for source, epoch, number in found if source == 0]
    assert len(of_a) == 1600
    for start in range(0, 1540, 70):
        epoch = of_a[start : start + 70]
        assert {e for e, _ in epoch} == {start // 70}
        assert sorted(n for _, n in epoch) == list(range(70))
    others = [(epoch, number) for source, epoch, number in order((0.9, 0.1)) if source == 0]
    assert others[: len(of_a)] == of_a
    assert order((0.4, 0.6), seed=4) != found


def test_visits_across_an_epoch_are_those_of_the_list() -> None:
    order = ShuffledEpochs(10, seed=1)
    whole = order.at(np.arange(35)).numbers
    assert all(sorted(whole[i : i + 10]) == list(range(10)) for i in (0, 10, 20))
    assert (ShuffledEpochs(10, 1).at(np.arange(8, 23)).numbers == whole[8:23]).all()


def test_skipped_steps_are_never_read_and_all_others_are() -> None:
    skipped = [(3, 5), (6, 6), (10, 10)]
    read = [data_step(step, skipped) for step in range(1, 9)]
    assert read == [1, 2, 7, 8, 9, 11, 12, 13]
    assert data_step(4, []) == 4


def test_sources_with_few_sequences_per_step_are_named() -> None:
    shares = [share("large", 0.8), share("exact", 0.125), share("odd", 0.0371234)]
    blend = Blend([share("a", 0.75), share("b", 0.25)], 100)
    assert blend.coarse(8) == []
    assert Blend(shares[:2], 100).coarse(37) == []
    assert [line.split()[0] for line in Blend(shares, 100).coarse(8)] == ["exact", "odd"]
    assert Blend(shares, 100).coarse(4096) == []

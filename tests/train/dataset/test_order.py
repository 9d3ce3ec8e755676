"""Which sequences a step reads: permutations, blends, skipped steps. Compared with counting."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest

from configs.errors import ConfigError
from train.dataset import order as order_module
from train.dataset.blend import Blend, Share
from train.dataset.order import BlendedEpochs, ShuffledEpochs, data_step
from train.dataset.permutation import KeyedPermutation


def blend(shares: Sequence[Share], length: int, global_batch: int = 1, seq_len: int = 1) -> Blend:
    return Blend(shares, length, global_batch=global_batch, seq_len=seq_len)


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


def test_weights_of_three_decimals_are_exact_over_any_thousand_steps() -> None:
    weights, global_batch = (0.617, 0.283, 0.099, 0.001), 8
    shares = [share(str(w), w) for w in weights]
    found = blend(shares, 3000 * global_batch, global_batch).at(np.arange(3000 * global_batch))
    sources = found.sources
    assert (found.lengths == 1).all() and (found.rows == np.arange(len(sources))).all()
    for source, weight in enumerate(weights):
        count = np.concatenate([[0], np.cumsum(sources == source)])
        windows = count[1000 * global_batch :] - count[: -1000 * global_batch]
        assert (windows == round(1000 * global_batch * weight)).all()


def test_weights_change_at_their_sequence() -> None:
    shares = [Share("a", ((0, 1.0), (600, 3.0)), Fraction(1), None), share("b", 1.0)]
    found = blend(shares, 1000)
    assert found.drawn(600) == (300, 300)
    assert found.drawn(1000) == (600, 400)


def test_a_source_is_read_max_epochs_times_and_then_the_others() -> None:
    whole = blend([share("a", 0.5, limit=100), share("b", 0.25), share("c", 0.25)], 1000)
    found = whole.at(np.arange(1000))
    sources, draws = found.sources, found.draws
    assert (sources == 0).sum() == 100 and draws[sources == 0].max() == 99
    last = np.flatnonzero(sources == 0)[-1]
    assert 198 <= last <= 200
    assert whole.drawn(1000)[1:] == (450, 450)


def test_a_blend_that_ends_too_early_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"after 130 of 131 sequences.*\(a, b\)"):
        blend([share("a", 0.5, limit=100), share("b", 0.5, limit=30)], 131)
    blend([share("a", 0.5, limit=100), share("b", 0.5, limit=30)], 130)
    with pytest.raises(ConfigError, match="after 50 of 60"):
        blend([Share("a", ((0, 1.0), (50, 0.0)), Fraction(1), None)], 60)
    with pytest.raises(ConfigError, match="weight of b is less than one token in 1,000 steps"):
        blend([share("a", 1), share("b", 1e-9)], 10, seq_len=64)


def test_weights_count_tokens_where_sequences_have_padding() -> None:
    shares = [share("full", 0.5, tokens=100), share("half", 0.5, tokens=50)]
    full, half = blend(shares, 3000, seq_len=100).drawn(3000)
    assert abs(full * 100 - half * 50) <= 150 * 100


def test_an_epoch_of_a_blend_has_every_sequence_once_and_no_other_source_changes_it() -> None:
    def order(weights: tuple[float, float], seed: int = 3) -> list[tuple[int, int, int]]:
        shares = [share("a", weights[0]), share("b", weights[1])]
        order = BlendedEpochs(blend(shares, 4000), (70, 301), ("a", "b"), seed)
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
    order = ShuffledEpochs(10, 4, seed=1)
    whole = order.at(np.arange(35)).numbers
    assert all(sorted(whole[i : i + 10]) == list(range(10)) for i in (0, 10, 20))
    assert (ShuffledEpochs(10, 4, 1).at(np.arange(8, 23)).numbers == whole[8:23]).all()


def test_skipped_steps_are_never_read_and_all_others_are() -> None:
    skipped = [(3, 5), (6, 6), (10, 10)]
    read = [data_step(step, skipped) for step in range(1, 9)]
    assert read == [1, 2, 7, 8, 9, 11, 12, 13]
    assert data_step(4, []) == 4


def test_a_long_source_is_in_keyed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    short = ShuffledEpochs(1000, 4, seed=1).at(np.arange(2000)).numbers
    assert (short[:1000] == np.random.default_rng([1, 0]).permutation(1000)).all()
    monkeypatch.setattr(order_module, "MOST_IN_MEMORY", 999)
    keyed = ShuffledEpochs(1000, 4, seed=1).at(np.arange(2000)).numbers
    assert (np.sort(keyed[:1000]) == np.arange(1000)).all()
    assert (np.sort(keyed[1000:]) == np.arange(1000)).all()
    assert (keyed[:1000] == KeyedPermutation(1000, 1, "", 0)(np.arange(1000))).all()

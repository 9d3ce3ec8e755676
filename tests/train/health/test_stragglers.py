"""Slow ranks in synthetic times: +10, +20 and +50 percent are named within 20 steps, and 1,000
clean steps name no rank."""

import random

import pytest

from train.health.stragglers import EVERY, StepTime, Stragglers


def times(
    source: random.Random, ranks: int, slow: dict[int, float], noise: float, share: float = 0.0
) -> list[list[StepTime]]:
    """Times of the last steps: own times with noise, some of it common to all ranks."""
    found: list[list[StepTime]] = [[] for _ in range(ranks)]
    for _ in range(EVERY):
        common = 1 + abs(source.gauss(0, share))
        own = [
            0.3 * common * max(0.5, 1 + source.gauss(0, noise)) * (1 + slow.get(rank, 0.0))
            for rank in range(ranks)
        ]
        for rank, seconds in enumerate(own):
            found[rank].append(StepTime(seconds, max(own) - seconds + 0.01, 0.001))
    return found


def named(lines: list[str]) -> list[int]:
    return [int(line.split("rank ")[1].split()[0]) for line in lines]


PERCENTS = [10, 20, 50]


@pytest.mark.parametrize(
    ("ranks", "percent", "offset"),
    [
        pytest.param(
            ranks, percent, offset,
            # of many ranks, every offset with one share only
            marks=[pytest.mark.slow] if ranks == 24 and PERCENTS[offset % 3] != percent else [],
        )
        for ranks in (2, 4, 24)
        for percent in PERCENTS
        for offset in range(EVERY)
    ],
)  # fmt: skip
def test_a_slow_rank_is_named_within_20_steps(ranks: int, percent: int, offset: int) -> None:
    """It becomes slow at any step of the five between two exchanges."""
    source = random.Random(100 * ranks + percent + offset)
    for victim in {0, ranks - 1}:
        watch, begun = Stragglers(8.0), 200 + offset
        found: list[tuple[int, int]] = []
        for step in range(EVERY, begun + 26, EVERY):
            now = times(source, ranks, {}, 0.02, 0.1)
            late = times(source, ranks, {victim: percent / 100}, 0.02, 0.1)
            mixed = [
                [*clean[: max(begun - step + EVERY, 0)], *slow[max(begun - step + EVERY, 0) :]]
                for clean, slow in zip(now, late, strict=True)
            ]
            found += [(step, rank) for rank in named(watch.add(step, mixed))]
        assert found and found[0][1] == victim and found[0][0] - begun <= 20, found


@pytest.mark.parametrize(
    ("ranks", "noise"),
    [
        pytest.param(
            ranks,
            noise,
            # with `_ERRORS` = 0, only the largest noise names a rank
            marks=[pytest.mark.slow] if noise == 0.01 or (noise == 0.03 and ranks != 4) else [],
        )
        for ranks in (2, 4, 64)
        for noise in (0.0, 0.01, 0.03, 0.1)
    ],
)
def test_clean_steps_name_no_rank(ranks: int, noise: float) -> None:
    for seed in range(3 if ranks < 64 else 1):
        source, watch = random.Random(seed), Stragglers(8.0)
        for step in range(EVERY, 1001, EVERY):
            lines = watch.add(step, times(source, ranks, {}, noise, 0.3))
            assert not lines, lines


def test_outliers_of_single_steps_name_no_rank() -> None:
    source, watch = random.Random(0), Stragglers(8.0)
    for step in range(EVERY, 1001, EVERY):
        now = times(source, 4, {}, 0.02)
        if step % 25 == 0:  # a pause of one step, as for a file system
            now[2][0] = StepTime(3.0, 0.0, 0.001)
        assert not watch.add(step, now)


def test_a_named_rank_is_not_repeated_at_once_and_late_data_counts() -> None:
    watch = Stragglers(8.0)
    late = [[StepTime(0.3, 0.1, 0.0)] * EVERY, [StepTime(0.3, 0.0, 0.1)] * EVERY]
    found = [step for step in range(EVERY, 301, EVERY) if watch.add(step, late)]
    assert found == [15, 115, 215]
    assert not any(Stragglers(0.0).add(step, late) for step in range(EVERY, 100, EVERY))

"""The pauses of the thread that writes in the background."""

import random
import sys
import time
from collections.abc import Iterator

import pytest

from train.checkpoint.storage.pace import SHARE, Pace, thread_times


def pauses(pieces: list[tuple[float, float]]) -> list[float]:
    """The pause after each piece of work, which computed and waited so many seconds."""

    def times() -> Iterator[tuple[float, float]]:
        computed = waited = 0.0
        yield computed, waited
        for one, other in pieces:
            computed, waited = computed + one, waited + other
            yield computed, waited

    clock = times()
    pace = Pace(lambda: next(clock))
    return [pace.pause() for _ in pieces]


def test_a_thread_with_a_core_of_its_own_never_pauses() -> None:
    rng = random.Random(3)
    assert set(pauses([(rng.uniform(0, 0.1), 0.0) for _ in range(50)])) == {0.0}
    assert set(pauses([(rng.uniform(0.1, 0.2), 0.001) for _ in range(50)])) == {0.0}
    assert set(pauses([(0.0, 0.0)] * 3)) == {0.0}  # a system without these times


def test_a_thread_that_waits_for_a_core_computes_a_small_share_of_the_time() -> None:
    rng = random.Random(4)
    pieces = [(rng.uniform(0.001, 0.01), rng.uniform(0.001, 0.1)) for _ in range(50)]
    found = pauses(pieces)
    computed = sum(one for one, _ in pieces)
    assert computed / (computed + sum(found)) == pytest.approx(SHARE)
    # also where one piece of ten waits, and from then on until the core has been idle for a while
    found = pauses([(0.002, 0.01 if i % 10 == 5 else 0.0) for i in range(40)])
    assert found[:5] == [0.0] * 5 and min(found[5:]) > 0.04
    found = pauses([(0.002, 0.01)] + [(0.002, 0.0)] * 60)
    assert found[0] > 0.04 and found[-1] == 0.0


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_the_system_reports_the_times_of_this_thread() -> None:
    before = thread_times()
    end = time.thread_time() + 0.02
    while time.thread_time() < end:
        pass
    computed = thread_times()[0] - before[0]
    assert 0.015 < computed < 0.2

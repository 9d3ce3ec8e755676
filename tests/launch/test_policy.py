"""What the supervisor does after an attempt, for histories of any kind."""

import os
import random
import signal

import pytest

from configs.health.heartbeat import HANG_CODE
from launch.supervisor.policy import Decision, Ended, History, Limits


def history(ranks: int = 4, newest: int = -1, **limits: float) -> History:
    return History(Limits(**limits), ranks, newest)  # type: ignore[arg-type]


def killed(done: int, saved: int = -1, rank: int = 1, code: int = -9) -> Ended:
    return Ended(code, rank, f"forward of step {done + 1}", done, saved)


@pytest.mark.parametrize(
    ("code", "stopped", "expected"),
    [
        (0, 0, 0), (2, 0, 2), (75, 0, 75), (130, 0, 130), (0, signal.SIGTERM, 0),
        (-15, signal.SIGTERM, 75), (-2, signal.SIGINT, 130), (1, signal.SIGUSR1, 75),
        (-9, signal.SIGTERM, 75), (HANG_CODE, signal.SIGTERM, 75),
    ],
)  # fmt: skip
def test_what_is_never_repeated(code: int, stopped: int, expected: int) -> None:
    ended = Ended(code, 0, "start", 0, -1)
    assert history().decide(ended, stopped, 0.0) == Decision(expected)


def test_progress_is_repeated_until_the_budget_of_an_hour_is_spent() -> None:
    runs = history(restarts_per_hour=5)
    for i in range(5):
        decision = runs.decide(killed(10 * (i + 1)), 0, 60.0 * i)
        assert decision.code is None and decision.pause_s == 0
    spent = runs.decide(killed(60), 0, 300.0)
    assert spent.code == 128 + 9 and "--restarts-per-hour" in spent.lines[-1]
    later = history(restarts_per_hour=5)
    assert all(later.decide(killed(i + 1), 0, 721.0 * i).code is None for i in range(100))


def test_no_progress_is_not_repeated_for_ever_and_pauses_double() -> None:
    runs = history(attempts_without_progress=5, backoff_s=2.0, longest_pause_s=5.0)
    assert runs.decide(killed(7, saved=5), 0, 0.0) == Decision(None)
    pauses = [runs.decide(killed(7, saved=5), 0, 1.0).pause_s for _ in range(4)]
    assert pauses == [0.0, 2.0, 4.0, 5.0]
    last = runs.decide(killed(6, saved=5), 0, 2.0)
    assert last.code == 137 and "5 attempts in a row" in last.lines[-1]


def test_a_resumed_run_that_fails_before_its_next_step_has_no_progress() -> None:
    runs = history(newest=100)
    for _ in range(2):
        assert runs.decide(killed(100, saved=100), 0, 0.0).code is None
    assert runs.decide(killed(100, saved=100), 0, 0.0).code == 137
    runs = history(newest=100)
    assert runs.decide(killed(100, saved=100), 0, 0.0).code is None
    assert runs.decide(killed(101, saved=100), 0, 0.0).code is None
    assert runs.idle == 0


def test_the_same_error_twice_is_no_accident() -> None:
    runs = history()
    error = Ended(1, 2, "optimizer of step 31", 30, 20)
    assert runs.decide(error, 0, 0.0).code is None
    again = runs.decide(error, 0, 9.0)
    assert again.code == 1 and "the same failure twice" in again.lines[-1]
    runs = history()
    assert runs.decide(error, 0, 0.0).code is None
    assert runs.decide(Ended(1, 2, "optimizer of step 32", 31, 20), 0, 0.0).code is None
    for code in (-9, HANG_CODE):  # a signal or a hang may be an accident
        runs = history()
        assert runs.decide(killed(30, code=code), 0, 0.0).code is None
        assert runs.decide(killed(30, code=code), 0, 0.0).code is None


def test_a_rank_that_fails_again_and_again_is_named() -> None:
    runs = history()
    assert runs.decide(killed(1, rank=3), 0, 0.0).lines == ()
    assert runs.decide(killed(2, rank=1), 0, 0.0).lines == ()
    assert (
        "rank 3 was the first to fail in 2 of the last 3"
        in (runs.decide(killed(3, rank=3), 0, 0.0).lines[0])
    )
    alone = history(ranks=1)
    assert [alone.decide(killed(i, rank=0), 0, 0.0).lines for i in (1, 2)] == [(), ()]


def test_any_history_ends() -> None:
    """Whatever happens, attempts stop once neither steps nor checkpoints come."""
    source = random.Random(0)
    for _ in range(300):
        runs = history(ranks=source.choice([1, 4]), newest=source.choice([-1, 5]))
        done, saved, now, attempts = 0, runs.newest, 0.0, 0
        while attempts < 1000:
            attempts += 1
            if attempts < 20 and source.random() < 0.5:
                done += source.randrange(3)
                saved = max(saved, source.choice([saved, done]))
            now += source.expovariate(1 / 600)
            code = source.choice([1, 3, -9, -11, -6, HANG_CODE])
            decision = runs.decide(Ended(code, source.randrange(4), "load", done, saved), 0, now)
            assert decision.code is None or 0 < decision.code < 256
            if decision.code is not None:
                break
            assert 0 <= decision.pause_s <= 60
        assert attempts < 60


def test_reasons_are_words() -> None:
    assert Ended(-9).reason == "was killed by SIGKILL"
    assert Ended(-99).reason == "was killed by signal 99"
    assert Ended(HANG_CODE).reason == "made the run hang"
    assert Ended(os.EX_USAGE).reason == "failed with exit code 64"

"""Learning-rate schedules by hand."""

from itertools import pairwise

import pytest

from configs.schema import ScheduleConfig
from train.optim.schedule import learning_rate


def curve(schedule: ScheduleConfig, steps: int = 10) -> list[float]:
    return [learning_rate(schedule, 2.0, step, steps) for step in range(1, steps + 1)]


def test_wsd() -> None:
    schedule = ScheduleConfig(kind="wsd", warmup_steps=2, decay_fraction=0.4, min_lr_fraction=0.1)
    expected = [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.55, 1.1, 0.65, 0.2]
    assert curve(schedule) == pytest.approx(expected)


def test_linear_and_cosine() -> None:
    assert curve(ScheduleConfig(kind="linear", warmup_steps=0)) == pytest.approx(
        [1.8, 1.6, 1.4, 1.2, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0], abs=1e-12
    )
    cosine = curve(ScheduleConfig(kind="cosine", warmup_steps=2, min_lr_fraction=0.5))
    assert cosine[5] == pytest.approx(1.5) and cosine[-1] == pytest.approx(1.0)
    assert all(a >= b for a, b in pairwise(cosine[1:]))


@pytest.mark.parametrize("kind", ["wsd", "cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 1, 9, 10, 50])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_never_outside_its_range(kind: str, warmup: int, steps: int) -> None:
    schedule = ScheduleConfig(kind=kind, warmup_steps=warmup, decay_fraction=1.0)  # type: ignore[arg-type]
    assert all(0 <= lr <= 2 for lr in curve(schedule, steps))


def test_a_share_of_the_steps_is_warmup_at_any_length() -> None:
    given, shared = ScheduleConfig(warmup_steps=30), ScheduleConfig(warmup_fraction=0.075)
    assert curve(shared, 400) == curve(given, 400)
    assert curve(shared, 1) == [2.0], "no step of one is warmup"
    both = ScheduleConfig(warmup_steps=7, warmup_fraction=0.9)
    assert curve(both, 20) == curve(ScheduleConfig(warmup_steps=7), 20)

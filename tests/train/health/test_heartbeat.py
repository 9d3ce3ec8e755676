"""The heartbeat of a rank: what the supervisor reads, the limits of its phases, and its cost."""

import time
from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.health import heartbeat
from configs.health.settings import HealthConfig
from train.health.heartbeat import Heartbeat


def test_the_supervisor_reads_what_the_rank_writes(tmp_path: Path) -> None:
    assert heartbeat.read(tmp_path, 3) is None
    rank = Heartbeat(3, str(tmp_path))
    found = heartbeat.read(tmp_path, 3)
    assert found is not None and (found.place, found.limit) == ("start", 0.0)
    rank.configure(HealthConfig(), "cpu")
    rank.enter("forward", 12, 11)
    found = heartbeat.read(tmp_path, 3)
    assert found == rank.beat and found is not None
    assert (found.place, found.step, found.done) == ("forward of step 12", 12, 11)
    (tmp_path / "rank-00004").write_bytes(b"short")
    assert heartbeat.read(tmp_path, 4) is None


def test_the_limit_of_a_phase_follows_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    rank = Heartbeat()
    rank.enter("load")
    assert rank.beat.limit == 0, "no limit before the settings are known"
    rank.configure(HealthConfig(hang_s=20, unknown_s=600), "cpu")
    assert rank.beat.limit == 600
    rank.enter("forward", 1)
    assert rank.beat.limit == 600, "it may compile"
    now[0] += 50
    rank.enter("backward")
    now[0] += 1
    rank.enter("forward", 2)
    assert rank.beat.limit == 150, "three times the longest"
    rank.enter("backward")
    assert rank.beat.limit == 20
    rank.enter("save")
    assert rank.beat.limit == 600
    rank.configure(HealthConfig(hang_s=0), "cpu")
    assert rank.beat.limit == 0
    slow = Heartbeat()
    slow.configure(HealthConfig(hang_s=20, unknown_s=30), "cuda")
    slow.enter("data", 1)
    slow.enter("data", 2)
    assert slow.beat.limit == 60


def test_a_pause_of_all_processes_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for who watches, nor for the limits that the rank learns."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    silence, rank = heartbeat.Silence(2.0), Heartbeat()
    rank.configure(HealthConfig(hang_s=20), "cpu")

    def pass_by(seconds: float) -> float:
        now[0] += seconds
        return silence.look(rank.beat.since)

    for step in (1, 2):
        rank.enter("forward", step)
        now[0] += 0.5
        rank.enter("backward", step)
    assert pass_by(1.0) == 1.0 and pass_by(1.0) == 2.0
    assert pass_by(3600.0) == 4.0, "at most two seconds of it were time of this process"
    assert pass_by(1.0) == 5.0
    rank.enter("forward", 3)
    now[0] += 0.2
    assert 0 < pass_by(0.3) <= 0.5, "a new phase"
    now[0] += 3600.0
    rank.enter("forward", 4)
    assert rank.beat.limit == 60, "three times its limit at most"


def test_it_costs_microseconds(tmp_path: Path) -> None:
    """A step of 10 ms with 6 phases may spend 10 microseconds."""
    rank = Heartbeat(0, str(tmp_path))
    rank.configure(HealthConfig(), "cpu")
    start = time.process_time()
    for step in range(1, 2001):
        for phase in ("data", "forward", "backward", "optimizer", "report"):
            rank.enter(phase, step, step - 1)
    assert (time.process_time() - start) / 2000 < 200e-6


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"frozen_s": 0.5}, "frozen_s = 0.5: must be 0 (off) or at least 1"),
        ({"hang_s": 100, "unknown_s": 50}, "unknown_s = 50: must be at least hang_s = 100"),
        ({"spike_window": 3}, "spike_window = 3"), ({"skip_window": 0}, "skip_window = 0"),
        ({"straggler_percent": float("nan")}, "straggler_percent = nan"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(values: dict[str, float], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        HealthConfig(**values)  # type: ignore[arg-type]
    assert expected in str(caught.value)

"""Which stopped processes the supervisor notices, and by which clock."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.health.settings import HealthConfig
from launch.supervisor import processes, supervise
from launch.supervisor.fork_server import Child
from launch.supervisor.processes import Rank
from tests.runs import ROOT
from train.health.heartbeat import Heartbeat

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux only")
HEALTH = HealthConfig(frozen_s=5.0)


@pytest.fixture
def children() -> Iterator[list[Child]]:
    """Three processes that wait."""
    started = [subprocess.Popen(["sleep", "600"]) for _ in range(3)]
    yield [Child(one.pid, one) for one in started]
    for one in started:
        one.kill()
        one.wait()


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic clock of the supervisor."""
    seconds = [100.0]
    monkeypatch.setattr(supervise.time, "monotonic", lambda: seconds[0])
    return seconds


def watched(
    children: list[Child], tmp_path: Path, health: HealthConfig = HEALTH
) -> supervise._Watch:
    """Of two ranks and a store."""
    files = [tmp_path / name for name in ("out", "err")]
    for file in files:
        file.touch()
    ranks = [Rank(number, child, *files) for number, child in enumerate(children[:2])]
    return supervise._Watch(ranks, children[2], tmp_path, health)


def stop(child: Child) -> None:
    """Stop a process, and wait until it is: on a busy machine that takes time."""
    child.send_signal(signal.SIGSTOP)
    while not processes.is_stopped(child.pid):
        os.sched_yield()


def looks(watch: supervise._Watch, now: list[float], seconds: int) -> tuple[int, str] | None:
    """The first finding within so many seconds."""
    for _ in range(seconds):
        now[0] += 1.0
        if found := watch.late():
            return found
    return None


@pytest.mark.parametrize(("number", "expected"), [
    (0, "rank 0 .*stopped for 14 s in start"), (1, "rank 1 .*stopped for 14 s in start"),
    (2, "the process of the store .*stopped for 14 s"),
])  # fmt: skip
def test_a_process_that_is_stopped_before_its_first_heartbeat(
    number: int, expected: str, children: list[Child], tmp_path: Path, now: list[float]
) -> None:
    watch = watched(children, tmp_path)
    assert looks(watch, now, 60) is None
    stop(children[number])
    now[0] += 3600  # a pause of the supervisor is no time of a rank
    found = looks(watch, now, 60)
    assert found is not None and re.search(expected, found[1]), found
    assert found[0] == (number if number < 2 else 0)


def test_a_rank_that_has_not_got_its_limits_yet(
    children: list[Child], tmp_path: Path, now: list[float]
) -> None:
    Heartbeat(1, str(tmp_path))
    watch = watched(children, tmp_path)
    stop(children[1])
    assert looks(watch, now, 10) is None
    children[1].send_signal(signal.SIGCONT)
    while processes.is_stopped(children[1].pid):
        os.sched_yield()
    assert looks(watch, now, 60) is None, "it continues"
    stop(children[1])
    found = looks(watch, now, 20)
    assert found is not None and found[0] == 1 and "in start" in found[1]


def test_it_can_be_turned_off(children: list[Child], tmp_path: Path, now: list[float]) -> None:
    watch = watched(children, tmp_path, HealthConfig(frozen_s=0.0))
    stop(children[0])
    assert looks(watch, now, 100) is None


def test_limits_do_not_depend_on_the_time_of_day() -> None:
    """Which a user, or a time server, may change while a run trains."""
    folders = ("launch/supervisor", "configs/health", "train/health", "train/process", "parallel")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        found = re.search(
            r"\btime\.time(_ns)?\(|\bdatetime\.(now|today)|st_mtime", path.read_text()
        )
        assert found is None, path

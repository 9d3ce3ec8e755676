"""Two ranks started by hand, as on two hosts: shared folders, and the state after a rank is
lost."""

import json
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import forks
from tests.forks import Program
from tests.runs import TINY, environment, free_port
from tests.train.in_process import train
from train.report.metrics import read_lines

pytestmark = pytest.mark.skipif(not forks.POSSIBLE, reason="Linux only")


IMPATIENT = """
import sys
from train import shared_storage
from train.__main__ import main
shared_storage._PATIENCE_S = 1.0
sys.exit(main(sys.argv[1:]))
"""
"""A training that waits for a second, not for ten, until a network file system shows a new name."""


def start(
    rank: int,
    port: int,
    arguments: list[str],
    cwd: Path,
    program: tuple[str, str] = ("-m", "train"),
) -> Program:
    env = {
        "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "HOME": str(cwd),
    }  # fmt: skip
    return Program([*program, str(TINY), *arguments], environment() | env, cwd=cwd)


@pytest.mark.long
@pytest.mark.parametrize(
    ("key", "there"),
    [
        ("run.dir", "relative"),
        pytest.param("run.dir", "~/run", marks=pytest.mark.slow),
        pytest.param("data.cache_dir", "relative", marks=pytest.mark.slow),
        (None, None),
    ],
)
def test_what_hosts_must_share_is_checked_at_the_start(
    key: str | None, there: str | None, overrides: list[str], tmp_path: Path
) -> None:
    port, hosts = free_port(), [tmp_path / "a", tmp_path / "b"]
    arguments = [*overrides, "--train.steps=2", *([f"--{key}={there}"] if key else [])]
    differ = [[], [] if key else ["--optimizer.lr=1", "--train.steps=3"]]
    for host in hosts:
        host.mkdir()
    with ExitStack() as running:
        ranks = [
            start(r, port, [*arguments, *differ[r]], hosts[r], ("-c", IMPATIENT)) for r in (0, 1)
        ]
        ends = [running.enter_context(rank).finish(60) for rank in ranks]
    assert [end.returncode for end in ends] == [2, 2]
    error = ends[0].stderr
    assert error.count("\n") == 1 and "Traceback" not in error + ends[1].stderr
    if key:
        assert f"{key} = '{there}': rank 1 on " in error
        assert str(hosts[0]) in error and str(hosts[1]) in error
        assert "one folder that all hosts share" in error
    else:
        assert "other settings than rank 0: train.steps, optimizer.lr" in error
    assert not list(tmp_path.rglob("metrics.jsonl")), "nothing has begun"
    assert not list(tmp_path.rglob(".shared-*")), "no token is left"


@pytest.mark.long
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_rank_is_named_and_the_same_command_resumes(
    lost: int, overrides: list[str], tmp_path: Path
) -> None:
    port, folder = free_port(), tmp_path / "run"
    arguments = [*overrides, "--schedule.steps=5000"]
    arguments += ["--train.micro_batch=4"]
    with ExitStack() as running:
        long = [*arguments, "--train.steps=5000"]
        ranks = [running.enter_context(start(r, port, long, tmp_path)) for r in (0, 1)]
        deadline = time.monotonic() + 120
        while not (folder / "checkpoints" / "step-00000004" / "manifest.json").exists():
            assert time.monotonic() < deadline and all(rank.is_running() for rank in ranks)
            time.sleep(0.05)
        ranks[lost].signal(signal.SIGKILL)
        end = ranks[1 - lost].finish(120)
    code, error = end.returncode, end.stderr
    assert code == 1 and error.count("\n") == 1, error
    assert f"rank {lost}" in error and "does not answer any more" in error
    assert "the same command resumes" in error
    newest = max(int(p.name[5:]) for p in (folder / "checkpoints").glob("step-*"))
    assert train(*arguments, f"--train.steps={newest + 1}") == 0
    recorded = [record["step"] for record in read_lines(folder / "metrics.jsonl")]
    assert recorded == list(range(1, newest + 2))
    assert len(json.loads((folder / "environment.json").read_text())) == 2

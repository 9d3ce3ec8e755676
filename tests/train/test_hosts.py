"""Two ranks started by hand, as on two hosts: shared folders, and the state after a rank is
lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import ROOT, TINY, environment, free_port
from tests.train.in_process import train
from train.report.metrics import read_lines


def start(rank: int, port: int, arguments: list[str], cwd: Path = ROOT) -> subprocess.Popen[str]:
    env = environment() | {
        "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "HOME": str(cwd),
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "train", str(TINY), *arguments],
        cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(*processes: subprocess.Popen[str]) -> list[tuple[int, str]]:
    """Exit code and stderr of each."""
    try:
        ends = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, end) for p, end in zip(processes, ends, strict=True)]


@pytest.mark.parametrize(
    ("key", "there"),
    [("run.dir", "relative"), ("run.dir", "~/run"), ("data.cache_dir", "relative"), (None, None)],
)
def test_what_hosts_must_share_is_checked_at_the_start(
    key: str | None, there: str | None, overrides: list[str], tmp_path: Path
) -> None:
    port, hosts = free_port(), [tmp_path / "a", tmp_path / "b"]
    arguments = [*overrides, "--train.steps=2", *([f"--{key}={there}"] if key else [])]
    differ = [[], [] if key else ["--optimizer.lr=1", "--train.steps=3"]]
    for host in hosts:
        host.mkdir()
    ends = finish(*[start(r, port, [*arguments, *differ[r]], hosts[r]) for r in (0, 1)])
    assert [code for code, _ in ends] == [2, 2]
    error = ends[0][1]
    assert error.count("\n") == 1 and "Traceback" not in error + ends[1][1]
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
    arguments = [*overrides, "--schedule.steps=5000", "--train.micro_batch=4"]
    ranks = [start(rank, port, [*arguments, "--train.steps=5000"]) for rank in (0, 1)]
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / "step-00000004" / "manifest.json").exists():
        assert time.monotonic() < deadline and all(p.poll() is None for p in ranks)
        time.sleep(0.05)
    os.kill(ranks[lost].pid, signal.SIGKILL)
    code, error = finish(*ranks)[1 - lost]
    assert code == 1 and error.count("\n") == 1, error
    assert f"rank {lost}" in error and "does not answer any more" in error
    assert "the same command resumes" in error
    newest = max(int(p.name[5:]) for p in (folder / "checkpoints").glob("step-*"))
    assert train(*arguments, f"--train.steps={newest + 1}") == 0
    recorded = [record["step"] for record in read_lines(folder / "metrics.jsonl")]
    assert recorded == list(range(1, newest + 2))
    assert len(json.loads((folder / "environment.json").read_text())) == 2

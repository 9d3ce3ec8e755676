"""`python -m launch.local`: a stopped training ends with code 75, and the next one continues."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.run_folder import records
from tests.runs import ROOT, TINY, environment, run

ENDLESS = ["--train.steps=100000", "--schedule.steps=100000", "--checkpoint.every=2"]


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "launch.local", str(TINY), *words],
        cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.slow  # tests/faults/test_faults.py ends with the same
@pytest.mark.parametrize(
    ("ranks", "stop"),
    [pytest.param(1, signal.SIGTERM, id="one"), pytest.param(2, signal.SIGUSR1, id="two")],
)
def test_a_stopped_training_ends_with_75_and_continues(
    ranks: int, stop: signal.Signals, overrides: list[str], tmp_path: Path
) -> None:
    words = [f"--nproc={ranks}", *overrides, *ENDLESS]
    with start(*words) as process:
        deadline = time.monotonic() + 50
        while not list((tmp_path / "run" / "checkpoints").glob("step-*")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        os.kill(process.pid, stop)
        said, errors = process.communicate(timeout=40)
    assert process.returncode == 75, said + errors
    steps = len(records(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / f"step-{steps:08}" / "manifest.json").is_file()
    rest = [word for word in words if not word.startswith("--nproc")]
    run("-m", "train", TINY, *rest, f"--train.steps={steps + 2}", ranks=ranks)
    assert [r["step"] for r in records(tmp_path / "run")] == list(range(1, steps + 3))


def test_a_mesh_that_does_not_fit_is_one_line() -> None:
    with start("--nproc=3") as process:
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 2 and errors.count("\n") == 1 and "multiple of" in errors

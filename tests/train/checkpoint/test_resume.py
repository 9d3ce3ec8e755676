"""Kill and resume, stop and resume, another mesh, changed keys."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from safetensors.torch import load_file

from tests.runs import ROOT, TINY, command, environment, run, started
from tests.train.in_process import run_train
from train.report.metrics import read_lines
from train.trainer import Trainer


def losses(folder: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_lines(folder / "metrics.jsonl")}


def final_weights(folder: Path) -> dict[str, bytes]:
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}


def wait_for_step(folder: Path, step: int, is_running: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not any((folder / "checkpoints").glob(f"step-{step:08d}/manifest.json")):
        assert is_running() and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of one process: 12 steps, checkpoints of 8 and 12."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    cache = corpus.parent / "corpus-cache"
    run_train(TINY, f"--data.source={corpus}", f"--data.cache_dir={cache}", f"--run.dir={folder}")
    return folder


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    """A copy of `whole` in this test's run folder."""
    return shutil.copytree(whole, tmp_path / "run")


def stopped(
    arguments: list[Any], code: int, number: signal.Signals, at: int
) -> subprocess.CompletedProcess[str]:
    """Train in this process, with a signal when it looks for one for the `at`th time: before each
    microbatch and each batch of a validation."""
    real, looks = Trainer._stops, count(1)

    def look(trainer: Trainer) -> bool:
        if next(looks) == at:
            os.kill(os.getpid(), number)
            while trainer.stop.number is None:  # a thread receives it
                time.sleep(0.001)
        return real(trainer)

    with mock.patch.object(Trainer, "_stops", look):
        return run_train(*arguments, code=code)


def kill_and_resume(arguments: list[str], folder: Path, steps: int) -> Path:
    """Two ranks, killed after step 4 and restarted: everything equals an uninterrupted run.

    Returns the folder of that run, `folder/run`.
    """
    arguments = ["-m", "train", str(TINY), *arguments, "--checkpoint.async_save=true"]
    arguments += [f"--train.steps={steps}", "--checkpoint.every=4"]
    killed, whole = folder / "run", folder / "whole"
    run(*arguments, f"--run.dir={whole}", "--checkpoint.async_save=false", ranks=2)
    with started(*arguments, ranks=2) as program:
        wait_for_step(killed, 4, program.is_running)
        time.sleep(random.Random().uniform(0, 0.05 * (steps - 4)))
        program.signal(signal.SIGKILL)
        program.finish(60)
    run(*arguments, ranks=2)
    assert losses(killed) == losses(whole) and len(losses(whole)) == steps
    assert final_weights(killed) == final_weights(whole)
    return killed


@pytest.mark.long
def test_kill_and_resume_is_bit_identical(overrides: list[str], tmp_path: Path) -> None:
    killed = kill_and_resume(overrides, tmp_path, steps=8)
    environments = json.loads((killed / "environment.json").read_text())
    assert len(environments) == 2


@pytest.mark.parametrize(
    ("stop", "code"),
    [
        (signal.SIGTERM, 75),
        pytest.param(signal.SIGUSR1, 75, marks=pytest.mark.slow),  # tests/launch/test_local.py
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),  # tests/faults/test_signals.py
    ],
)
def test_a_stop_saves_and_the_rest_is_bit_identical(
    stop: signal.Signals, code: int, overrides: list[str], whole: Path, tmp_path: Path
) -> None:
    done = stopped([TINY, *overrides], code, stop, at=12)  # in the middle of step 6
    assert "Traceback" not in done.stdout + done.stderr
    assert max(losses(tmp_path / "run")) == 5
    assert "resuming from" in run_train(TINY, *overrides).stdout
    assert losses(tmp_path / "run") == losses(whole)
    assert final_weights(tmp_path / "run") == final_weights(whole)


@pytest.mark.slow  # tests/launch/test_local.py does the same with another signal
def test_under_torchrun_a_stop_saves_too(overrides: list[str], tmp_path: Path) -> None:
    arguments = [*overrides, "--schedule.decay_fraction=0", "--checkpoint.every=5"]
    process = subprocess.Popen(
        command("-m", "train", TINY, *arguments, "--train.steps=3000", ranks=2),
        cwd=ROOT, env=environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for_step(tmp_path / "run", 5, lambda: process.poll() is None)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=25)
    recorded = max(losses(tmp_path / "run"))
    steps = [int(p.name[5:]) for p in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert max(steps) == recorded, "the last complete step was saved"
    last = recorded + 1
    out = run("-m", "train", TINY, *arguments, f"--train.steps={last}", ranks=2).stdout
    assert f"resuming from {tmp_path / 'run'}" in out
    assert sorted(losses(tmp_path / "run")) == list(range(1, last + 1))


def test_resume_on_another_mesh(overrides: list[str], tmp_path: Path) -> None:
    # without a decay the schedule does not depend on train.steps
    arguments = [*overrides, "--schedule.decay_fraction=0", "--train.micro_batch=4"]
    straight = tmp_path / "straight"
    run_train(TINY, *arguments, "--train.steps=6", f"--run.dir={straight}")
    for before, ranks, steps in ((0, 2, 2), (2, 1, 4), (4, 2, 6)):
        words = [TINY, *arguments, f"--train.steps={steps}"]
        done = run_train(*words) if ranks == 1 else run("-m", "train", *words, ranks=ranks)
        said = f"changed since that checkpoint: train.steps (was {before}, is {steps})"
        assert (said in done.stdout) == bool(before)
    for step, loss in losses(straight).items():
        assert losses(tmp_path / "run")[step] == pytest.approx(loss, rel=1e-4), step


def test_a_validation_that_a_stop_cut_short_is_made_up(
    overrides: list[str], tmp_path: Path
) -> None:
    arguments = [
        str(TINY), *overrides, "--train.steps=4", "--validation.every=2",
        "--train.micro_batch=4", "--data.seq_len=16", "--checkpoint.every=0",
    ]  # fmt: skip
    whole, metrics = tmp_path / "whole", tmp_path / "run" / "metrics.jsonl"
    field = "validation_loss"
    run_train(*arguments, f"--run.dir={whole}")
    # after the microbatches of two steps, before the third of the validation's four batches
    stopped(arguments, 75, signal.SIGTERM, at=2 * 2 + 3)
    assert [field in record for record in read_lines(metrics)] == [False, False]
    run_train(*arguments)
    assert [r.get(field) for r in read_lines(metrics)] == [
        r.get(field) for r in read_lines(whole / "metrics.jsonl")
    ]


def test_one_run_dir_has_one_writer(overrides: list[str], tmp_path: Path) -> None:
    with started("-m", "train", TINY, *overrides, "--train.steps=2000") as program:
        wait_for_step(tmp_path / "run", 4, program.is_running)
        done = run_train(TINY, *overrides, code=2)
        assert "another process is training in this folder" in done.stderr


def test_weights_of_another_model_are_refused(
    overrides: list[str], whole: Path, tmp_path: Path
) -> None:
    done = run_train(
        TINY, *overrides, f"--checkpoint.init_from={whole}", "--model.n_layers=2", code=2
    )
    assert "its weights belong to another model.n_layers (was 3, is 2)" in done.stderr


def test_init_from_takes_weights_only(overrides: list[str], whole: Path, tmp_path: Path) -> None:
    second = tmp_path / "run"
    arguments = [*overrides, f"--checkpoint.init_from={whole}"]
    out = run_train(TINY, *arguments, "--train.steps=2").stdout
    assert "weights from" in out and "resuming" not in out
    assert losses(second)[1] < losses(whole)[1] - 0.1
    assert sorted(losses(second)) == [1, 2]
    out = run_train(TINY, *arguments, "--train.steps=3").stdout
    assert "resuming from" in out, "the run's own checkpoint comes first"


def test_what_must_not_change_is_refused(overrides: list[str], finished: Path) -> None:
    for change, expected in (
        ("--run.seed=5", "run.seed (was 0, is 5)"),
        ("--model.d_model=64", "model.d_model (was 32, is 64)"),
        ("--train.global_batch=16", "train.global_batch (was 8, is 16)"),
        ("--train.steps=10", "has done 12 steps, more than train.steps = 10"),
    ):
        done = run_train(TINY, *overrides, change, code=2)
        assert expected in done.stderr and done.stderr.count("\n") == 1


def test_a_damaged_checkpoint_is_set_aside(
    overrides: list[str], whole: Path, tmp_path: Path
) -> None:
    words = [TINY, *overrides, "--schedule.steps=12", "--checkpoint.every=2"]
    arguments = ["-m", "train", *words]
    run(*arguments, "--train.steps=4", ranks=2)
    folder = tmp_path / "run" / "checkpoints"
    file = next((folder / "step-00000004").glob("*.safetensors"))
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    file.write_bytes(damaged)
    out = run(*arguments, "--train.steps=6", ranks=2).stdout
    assert f"damaged, not used: {file}: damaged (checksum differs)\n" in out
    assert "step-00000004: renamed to damaged-step-00000004\n" in out
    assert f"resuming from {folder / 'step-00000002'}\n" in out
    first = {step: loss for step, loss in losses(whole).items() if step <= 6}
    assert losses(tmp_path / "run") == pytest.approx(first, rel=1e-4)
    assert (folder / "damaged-step-00000004" / file.name).read_bytes() == damaged
    again = run_train(*words, "--train.steps=6").stdout
    assert "damaged, not used" not in again


def test_without_a_sound_checkpoint_nothing_is_changed(
    overrides: list[str], finished: Path, tmp_path: Path
) -> None:
    folder = finished / "checkpoints"
    older, newer = sorted(folder.glob("step-*"))
    (newer / "manifest.json").write_text("{")
    (older / "rank-00000.safetensors").unlink()
    before = sorted(folder.rglob("*"))
    for _ in range(2):
        err = run_train(TINY, *overrides, code=2).stderr
        assert "no checkpoint is sound, and none is changed" in err and err.count("\n") == 1
        assert f"{newer.name}/manifest.json: unreadable" in err and "missing" in err
        assert sorted(folder.rglob("*")) == before
    second = [f"--run.dir={tmp_path / 'second'}", f"--checkpoint.init_from={finished}"]
    assert "no checkpoint is sound" in run_train(TINY, *overrides, *second, code=2).stderr


def test_weights_are_taken_from_a_sound_checkpoint(
    overrides: list[str], finished: Path, tmp_path: Path
) -> None:
    older, newest = sorted((finished / "checkpoints").glob("step-*"))
    (newest / "manifest.json").write_text("{")
    second = [f"--run.dir={tmp_path / 'second'}", f"--checkpoint.init_from={finished}"]
    out = run_train(TINY, *overrides, *second, "--train.steps=2").stdout
    assert "damaged, not used" in out and "weights from" in out and older.name in out
    assert newest.is_dir(), "another run's checkpoints are not changed"


def test_finished_runs_end_at_once_and_weights_are_finite(
    overrides: list[str], whole: Path, finished: Path
) -> None:
    run_train(TINY, *overrides)
    assert final_weights(finished) == final_weights(whole)
    assert losses(finished) == losses(whole)
    for path in (finished / "checkpoints").glob("*/*.safetensors"):
        assert all(t.isfinite().all() for t in load_file(path).values())

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

SHORT = ["--train.steps=6", "--schedule.steps=12", "--checkpoint.every=2"]
"""Six steps, checkpoints of 4 and 6; fewer steps have the same schedule."""


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


def data(corpus: Path) -> list[str]:
    cache = corpus.parent / "corpus-cache"
    short = "--validation.sequences=4"
    return [f"--data.source={corpus}", f"--data.cache_dir={cache}", short]


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of one process with SHORT."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_train(TINY, *data(corpus), *SHORT, f"--run.dir={folder}")
    return folder


@pytest.fixture(scope="module")
def two_ranks(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of two ranks with SHORT: 4 steps, checkpoints of 2 and
    4."""
    folder = tmp_path_factory.mktemp("ranks") / "run"
    words = [*data(corpus), *SHORT, "--train.steps=4", f"--run.dir={folder}"]
    run("-m", "train", TINY, *words, ranks=2)
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


def kill_and_resume(arguments: list[str], folder: Path, whole: Path) -> None:
    """Two ranks with SHORT, killed after step 2 of 4 and restarted: everything equals `whole`,
    whose saves are not asynchronous."""
    words = ["-m", "train", TINY, *arguments, *SHORT, "--train.steps=4"]
    words += ["--checkpoint.async_save=true"]
    with started(*words, ranks=2) as program:
        wait_for_step(folder, 2, program.is_running)
        time.sleep(random.Random().uniform(0, 0.2))
        program.signal(signal.SIGKILL)
        program.finish(60)
    run(*words, ranks=2)
    assert losses(folder) == losses(whole) and len(losses(whole)) == 4
    assert final_weights(folder) == final_weights(whole)


@pytest.mark.long
def test_kill_and_resume_is_bit_identical(
    overrides: list[str], two_ranks: Path, tmp_path: Path
) -> None:
    kill_and_resume(overrides, tmp_path / "run", two_ranks)
    environments = json.loads((tmp_path / "run" / "environment.json").read_text())
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
    words = [TINY, *overrides, *SHORT]
    done = stopped(words, code, stop, at=8)  # in the middle of step 4
    assert "Traceback" not in done.stdout + done.stderr
    assert max(losses(tmp_path / "run")) == 3
    assert "resuming from" in run_train(*words).stdout
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


def test_resume_on_another_mesh(
    overrides: list[str], whole: Path, two_ranks: Path, tmp_path: Path
) -> None:
    shutil.copytree(two_ranks, tmp_path / "run")
    for before, ranks, steps in ((4, 1, 5), (5, 2, 6)):
        words = [TINY, *overrides, *SHORT, f"--train.steps={steps}"]
        done = run_train(*words) if ranks == 1 else run("-m", "train", *words, ranks=ranks)
        said = f"changed since that checkpoint: train.steps (was {before}, is {steps})"
        assert said in done.stdout
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-4)


def test_a_validation_that_a_stop_cut_short_is_made_up(
    overrides: list[str], tmp_path: Path
) -> None:
    arguments = [
        str(TINY), *overrides, "--train.steps=3", "--validation.every=2",
        "--train.micro_batch=8", "--data.seq_len=16", "--checkpoint.every=0",
        "--validation.sequences=16",
    ]  # fmt: skip
    whole, metrics = tmp_path / "whole", tmp_path / "run" / "metrics.jsonl"
    field = "validation_loss"
    run_train(*arguments, f"--run.dir={whole}")
    # after the microbatches of two steps, before the second of the validation's two batches
    stopped(arguments, 75, signal.SIGTERM, at=2 + 2)
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
    arguments = [*overrides, f"--checkpoint.init_from={whole}", "--train.micro_batch=8"]
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
        ("--train.steps=5", "has done 6 steps, more than train.steps = 5"),
    ):
        done = run_train(TINY, *overrides, change, code=2)
        assert expected in done.stderr and done.stderr.count("\n") == 1


def test_a_damaged_checkpoint_is_set_aside(
    overrides: list[str], whole: Path, two_ranks: Path, tmp_path: Path
) -> None:
    words = [TINY, *overrides, *SHORT]
    shutil.copytree(two_ranks, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    file = next((folder / "step-00000004").glob("*.safetensors"))
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    file.write_bytes(damaged)
    out = run("-m", "train", *words, ranks=2).stdout
    assert f"damaged, not used: {file}: damaged (checksum differs)\n" in out
    assert "step-00000004: renamed to damaged-step-00000004\n" in out
    assert f"resuming from {folder / 'step-00000002'}\n" in out
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-4)
    assert (folder / "damaged-step-00000004" / file.name).read_bytes() == damaged
    again = run_train(*words).stdout
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
    run_train(TINY, *overrides, *SHORT)
    assert final_weights(finished) == final_weights(whole)
    assert losses(finished) == losses(whole)
    for path in (finished / "checkpoints").glob("*/*.safetensors"):
        assert all(t.isfinite().all() for t in load_file(path).values())

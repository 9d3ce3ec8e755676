"""A run that gets inf or NaN saves the last sound state, and never another."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import train.trainer
from parallel.dispatch.overflow import CapacityOverflow
from tests.train.in_process import train as run
from train.checkpoint import checkpoint
from train.report.metrics import read_lines
from train.step import NonFiniteError


def steps(folder: Path) -> list[int]:
    return [checkpoint.read_manifest(p).step for p in checkpoint.checkpoints(folder)]


def failing(at: int, error: Exception) -> Callable[..., Any]:
    real = train.trainer.train_step

    def step(*arguments: Any, **named: Any) -> Any:
        if named["step"] == at:
            raise error
        return real(*arguments, **named)

    return step


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "rank-00000.safetensors")


def test_the_last_good_state_is_saved_and_resumes(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One error twice, as the same settings end with the same error, and later another."""
    arguments = [*overrides, "--train.steps=7", "--checkpoint.every=2", "--checkpoint.keep=1"]
    folder = tmp_path / "run" / "checkpoints"
    numeric = partial(NonFiniteError, weights_are_good=True)
    for make, at, kept in (
        (numeric, 4, [2, 3]), (numeric, 4, [2, 3]), (CapacityOverflow, 6, [4, 5]),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            error = make(f"step {at}: fault")
            patch.setattr(train.trainer, "train_step", failing(at, error))
            assert run(*arguments) == 1
        assert capfd.readouterr().err == (
            f"error: {tmp_path / 'run'}: step {at}: fault; the newest checkpoint is "
            f"{folder / f'step-{at - 1:08d}'}\n"
        )
        assert steps(folder) == kept, "nothing older was removed"
    assert run(*arguments) == 0
    whole = tmp_path / "whole"
    assert run(*arguments, f"--run.dir={whole}") == 0
    one, other = (weights(p / "checkpoints" / "step-00000007") for p in (tmp_path / "run", whole))
    assert all(one[name].equal(other[name]) for name in other)
    assert steps(folder) == [7]


@pytest.mark.parametrize("every", [0, 1])
def test_a_poisoned_state_is_never_saved(
    every: int, overrides: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The update of step 3 makes a weight inf: neither the regular save nor the last one saves it,
    and the run does not end successfully."""
    real = train.trainer.train_step

    def step(model: Any, optimizer: Any, *arguments: Any, **named: Any) -> Any:
        result = real(model, optimizer, *arguments, **named)
        if named["step"] == 3:
            with torch.no_grad():
                next(iter(model.parameters()))[0, 0] = torch.inf
        return result

    monkeypatch.setattr(train.trainer, "train_step", step)
    folder = tmp_path / "run" / "checkpoints"
    for last in (3, 5):
        run_dir = f"--run.dir={tmp_path / 'run'}"
        code = run(*overrides, run_dir, f"--train.steps={last}", f"--checkpoint.every={every}")
        assert code == 1
        err = capfd.readouterr().err
        assert err.count("\n") == 1 and "is" in err
        assert steps(folder) == ([1, 2] if every else [])
        assert ("newest checkpoint is" in err) == bool(every)
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 3

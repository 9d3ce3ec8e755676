"""Checkpoints of FP8 runs: their content, resuming after a kill, changing the recipe."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scripts.validate import main as validate
from tests.runs import TINY, run
from tests.train.checkpoint.test_resume import SHORT, final_weights, kill_and_resume, losses
from tests.train.in_process import run_train

FP8 = [
    "--precision.recipe=fp8_blockwise", "--precision.fp8.power_of_two=true",
    "--precision.moments=bf16",
]  # fmt: skip
WHOLE_BATCH = "--train.micro_batch=8"
"""A step of one microbatch: what a checkpoint has does not depend on their number."""


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the newest checkpoint, which one rank has written."""
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    (file,) = newest.glob("*.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def two_steps(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run of two steps in FP8, and what it printed."""
    folder = tmp_path_factory.mktemp("fp8") / "run"
    data = [f"--data.source={corpus}", f"--data.cache_dir={corpus.parent / 'corpus-cache'}"]
    more = [f"--run.dir={folder}", "--schedule.decay_fraction=0", "--train.steps=2"]
    return folder, run_train(TINY, *data, *FP8, WHOLE_BATCH, *more).stdout


@pytest.mark.long
@pytest.mark.slow  # the next test resumes in one process; test_resume.py kills two ranks
def test_kill_and_resume_is_bit_identical(overrides: list[str], tmp_path: Path) -> None:
    words, whole = [*overrides, *FP8], tmp_path / "whole"
    more = [*SHORT, "--train.steps=4", f"--run.dir={whole}"]
    run("-m", "train", TINY, *words, *more, ranks=2)
    kill_and_resume(words, tmp_path / "run", whole)


def test_a_resumed_run_is_bit_identical(
    overrides: list[str], two_steps: tuple[Path, str], tmp_path: Path
) -> None:
    words = [TINY, *overrides, *FP8, "--schedule.decay_fraction=0", "--train.steps=3"]
    words += [WHOLE_BATCH, "--validation.sequences=1"]
    whole = tmp_path / "whole"
    run_train(*words, f"--run.dir={whole}")
    shutil.copytree(two_steps[0], tmp_path / "run")
    assert "resuming from" in run_train(*words).stdout
    assert losses(tmp_path / "run") == losses(whole) and len(losses(whole)) == 3
    assert final_weights(tmp_path / "run") == final_weights(whole)


@pytest.mark.parametrize("fp8_first", [True, False])
def test_weights_go_from_one_recipe_to_the_other(
    fp8_first: bool, overrides: list[str], two_steps: tuple[Path, str], tmp_path: Path
) -> None:
    """With a learning rate of zero the second run saves the same weights."""
    bf16 = ["--precision.recipe=bf16"]
    recipes = [FP8, bf16] if fp8_first else [bf16, FP8]
    first = two_steps[0] if fp8_first else tmp_path / "run"
    if not fp8_first:
        run_train(TINY, *overrides, *bf16, WHOLE_BATCH, "--train.steps=2")
    second = tmp_path / "second"
    more = [f"--run.dir={second}", f"--checkpoint.init_from={first}"]
    more += ["--train.steps=1", "--schedule.warmup_steps=0", "--optimizer.lr=0"]
    more += ["--model.moe.bias_update_rate=0"]
    run_train(TINY, *overrides, *recipes[1], WHOLE_BATCH, *more)
    given, got = saved(first), saved(second)
    weights = [name for name in given if name.startswith("model.")]
    assert len(weights) > 20
    for name in weights:
        assert given[name].dtype == torch.float32 and torch.equal(given[name], got[name]), name
    for tensors, recipe in ((given, recipes[0]), (got, recipes[1])):
        dtypes = {t.dtype for name, t in tensors.items() if ".exp_avg" in name}
        assert dtypes == {torch.bfloat16 if recipe is FP8 else torch.float32}
    # it continues instead of starting again
    assert losses(second)[1] == pytest.approx(losses(first)[2], rel=0.05)


def test_a_run_may_change_its_recipe_and_its_moments(
    overrides: list[str], two_steps: tuple[Path, str], tmp_path: Path
) -> None:
    shutil.copytree(two_steps[0], tmp_path / "run")
    more = ["--schedule.decay_fraction=0", "--train.steps=3", WHOLE_BATCH]
    out = run_train(TINY, *overrides, *more).stdout
    assert "precision.recipe (was 'fp8_blockwise', is 'fp32')" in out
    assert "precision.moments (was 'bf16', is 'fp32')" in out
    assert len(losses(tmp_path / "run")) == 3


def test_validation_alone_computes_in_the_runs_recipe(
    two_steps: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """`scripts.validate` gives the trainer's loss; in bf16 the same weights give a different
    one."""
    folder, out = two_steps
    trained = re.findall(r"validation loss ([\d.]+)", out)[-1]
    threads = "--train.threads=1"
    assert validate([str(folder), "--train.micro_batch=4", threads]) == 0
    alone = capsys.readouterr().out
    found = float(re.findall(r"([0-9.]+) nats", alone)[0])
    assert found == pytest.approx(float(trained), abs=2e-4)  # rounding in batches of another size
    bf16 = ["--precision.recipe=bf16", "--precision.fp8.power_of_two=false", threads]
    assert validate([str(folder), *bf16]) == 0
    other = capsys.readouterr().out
    assert "nats" in other and other != alone

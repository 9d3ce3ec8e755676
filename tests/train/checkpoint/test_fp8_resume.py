"""Checkpoints of FP8 runs: their content, resuming after a kill, changing the recipe."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import TINY, run
from tests.train.checkpoint.test_resume import kill_and_resume, losses

FP8 = [
    "--precision.recipe=fp8_blockwise", "--precision.fp8.power_of_two=true",
    "--precision.moments=bf16",
]  # fmt: skip


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the newest checkpoint, which one rank has written."""
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    (file,) = newest.glob("*.safetensors")
    return load_file(file)


@pytest.mark.long
def test_kill_and_resume_is_bit_identical(overrides: list[str], tmp_path: Path) -> None:
    kill_and_resume([*overrides, *FP8], tmp_path, steps=9)


@pytest.mark.parametrize("fp8_first", [True, False])
def test_weights_go_from_one_recipe_to_the_other(
    fp8_first: bool, overrides: list[str], tmp_path: Path
) -> None:
    """With a learning rate of zero the second run saves the same weights."""
    bf16 = ["--precision.recipe=bf16"]
    recipes = [FP8, bf16] if fp8_first else [bf16, FP8]
    run("-m", "train", TINY, *overrides, *recipes[0], "--train.steps=2")
    second = tmp_path / "second"
    more = [f"--run.dir={second}", f"--checkpoint.init_from={tmp_path / 'run'}"]
    more += ["--train.steps=1", "--schedule.warmup_steps=0", "--optimizer.lr=0"]
    more += ["--model.moe.bias_update_rate=0"]
    run("-m", "train", TINY, *overrides, *recipes[1], *more)
    given, got = saved(tmp_path / "run"), saved(second)
    weights = [name for name in given if name.startswith("model.")]
    assert len(weights) > 20
    for name in weights:
        assert given[name].dtype == torch.float32 and torch.equal(given[name], got[name]), name
    for tensors, recipe in ((given, recipes[0]), (got, recipes[1])):
        dtypes = {t.dtype for name, t in tensors.items() if ".exp_avg" in name}
        assert dtypes == {torch.bfloat16 if recipe is FP8 else torch.float32}
    first = losses(tmp_path / "run")[2], losses(second)[1]
    assert first[1] == pytest.approx(first[0], rel=0.05)  # it continues instead of starting again


def test_a_run_may_change_its_recipe_and_its_moments(overrides: list[str], tmp_path: Path) -> None:
    arguments = [*overrides, "--schedule.decay_fraction=0"]
    run("-m", "train", TINY, *arguments, *FP8, "--train.steps=2")
    out = run("-m", "train", TINY, *arguments, "--train.steps=3").stdout
    assert "precision.recipe (was 'fp8_blockwise', is 'fp32')" in out
    assert "precision.moments (was 'bf16', is 'fp32')" in out
    assert len(losses(tmp_path / "run")) == 3


def test_validation_alone_computes_in_the_runs_recipe(overrides: list[str], tmp_path: Path) -> None:
    """`scripts.validate` gives the trainer's loss; in bf16 the same weights give a different
    one."""
    out = run("-m", "train", TINY, *overrides, *FP8, "--train.steps=2").stdout
    trained = re.findall(r"validation loss ([\d.]+)", out)[-1]
    alone = run("-m", "scripts.validate", tmp_path / "run").stdout
    found = float(re.findall(r"([0-9.]+) nats", alone)[0])
    assert found == pytest.approx(float(trained), abs=2e-4)  # rounding in batches of another size
    bf16 = run("-m", "scripts.validate", tmp_path / "run", "--precision.recipe=bf16",
               "--precision.fp8.power_of_two=false").stdout  # fmt: skip
    assert bf16 != alone

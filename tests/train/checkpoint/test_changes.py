"""Which settings may change between a checkpoint and the run that starts from it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from configs.loader import flatten, load
from configs.schema import JobConfig
from tests.runs import TINY
from tests.train.in_process import train
from train.checkpoint import checkpoint
from train.checkpoint.config_changes import (
    CHANGES,
    ConfigChange,
    change_of,
    compare_for_resume,
    compare_for_start,
    is_new,
    rate_lines,
)
from train.report.metrics import read_lines

CONFIG = load(TINY)
KEYS = sorted(flatten(CONFIG))


def test_every_key_is_classified_and_none_that_is_not_there() -> None:
    for key in KEYS:
        assert isinstance(change_of(key), ConfigChange)
    sections = {key[:i] for key in KEYS for i, c in enumerate(key) if c == "."}
    assert CHANGES.keys() <= {*KEYS, *sections}
    with pytest.raises(KeyError):
        change_of("elsewhere.key")


def test_every_model_key_is_listed_or_in_a_listed_subsection() -> None:
    """Each new key of the model needs a decision, so `model` and `model.moe` have no entry of their
    own."""
    assert {"model", "model.moe"}.isdisjoint(CHANGES)


_TRAINING_ONLY = {
    "model.init_std": "0.5",
    "model.moe.bias_update_rate": "0",
    "model.moe.seq_aux_loss_coef": "0.1",
    "model.moe.global_aux_loss_coef": "0.1",
    "model.moe.router_z_loss_coef": "0.1",
    "train.z_loss_coef": "1e-4",
    "train.mtp_weight": "0.1",
    "optimizer.weight_decay": "0",
}


@pytest.mark.parametrize("key", _TRAINING_ONLY)
def test_what_is_no_function_of_the_network_may_change_always(key: str) -> None:
    config = load(TINY, [f"--{key}={_TRAINING_ONLY[key]}"])
    lines = compare_for_resume(CONFIG, config, 4)
    assert len(lines) == 1 and f"{key} (was " in lines[0]
    lines = compare_for_start(CONFIG, config)
    assert any(f"{key} (was " in line for line in lines) == key.startswith("model.")


@pytest.mark.parametrize(
    ("overrides", "key", "with_new_run"),
    [
        (["--model.d_ff=64"], "model.d_ff", False),
        (["--model.norm_eps=1e-5"], "model.norm_eps", False),
        (["--model.attention.qk_norm=none"], "model.attention.qk_norm", False),
        (["--model.moe.top_k=3"], "model.moe.top_k", False),
        (["--model.moe.route_scale=2"], "model.moe.route_scale", False),
        (["--model.rope.interleaved=true"], "model.rope.interleaved", False),
        (["--model.rope.theta=1e6"], "model.rope.theta", True),
        (["--model.mtp_depth=1"], "model.mtp_depth", True),
        (["--model.moe.force_balance=true"], "model.moe.force_balance", True),
        (["--run.seed=1"], "run.seed", True),
        (["--data.seq_len=64"], "data.seq_len", True),
        (["--train.global_batch=16"], "train.global_batch", True),
    ],
)
def test_what_decides_weights_or_data_is_refused(
    overrides: list[str], key: str, with_new_run: bool
) -> None:
    config = load(TINY, overrides)
    with pytest.raises(UserError, match=f"cannot resume with another {key}"):
        compare_for_resume(CONFIG, config, 4)
    if with_new_run:
        compare_for_start(CONFIG, config)
    else:
        with pytest.raises(UserError, match=f"belong to another {key}"):
            compare_for_start(CONFIG, config)


def test_mtp_modules_that_come_or_go_are_named() -> None:
    deep = load(TINY, ["--model.mtp_depth=3"])
    one = load(TINY, ["--model.mtp_depth=1"])
    assert "MTP modules 2 to 3: new, initialized from run.seed" in compare_for_start(one, deep)
    assert any("MTP modules 2 to 3: left out" in line for line in compare_for_start(deep, one))
    names = ["model.mtp.0.norm.weight", "model.mtp.1.norm.weight", "model.layers.2.norm.weight"]
    assert [is_new(name, one) for name in names] == [False, True, False]


def lasting(config: JobConfig, train_steps: int, **schedule: Any) -> JobConfig:
    made = replace(config.schedule, **schedule)
    return replace(config, train=replace(config.train, steps=train_steps), schedule=made)


def test_another_learning_rate_is_said_with_what_keeps_it() -> None:
    finished, longer = lasting(CONFIG, 12), lasting(CONFIG, 24)
    (line,) = rate_lines(finished, longer, 12)
    assert "3.00e-03 at step 13, after 0.00e+00 at step 12" in line
    assert "schedule.steps = 12 and schedule.min_lr_fraction = 0.1" in line
    kept = lasting(CONFIG, 24, steps=12, min_lr_fraction=0.1)
    (line,) = rate_lines(finished, kept, 12)
    assert "3.00e-04 at step 13" in line
    planned = lasting(CONFIG, 12, steps=24)
    assert not rate_lines(planned, longer, 12), "a schedule longer than the run goes on"
    assert not rate_lines(planned, lasting(CONFIG, 18, steps=24), 12)
    low = lasting(CONFIG, 12, min_lr_fraction=0.5)
    (line,) = rate_lines(low, lasting(CONFIG, 24, min_lr_fraction=0.5), 12)
    assert "schedule.steps = 12 keeps it (1.50e-03 at step 13)" in line
    assert not rate_lines(low, lasting(CONFIG, 24, steps=12, min_lr_fraction=0.5), 12)
    assert not rate_lines(finished, finished, 12) and not rate_lines(finished, longer, 4)
    faster = replace(CONFIG, optimizer=replace(CONFIG.optimizer, lr=1.0))
    (line,) = rate_lines(CONFIG, faster, 4)
    assert "1.00e+00 at step 5, after 3.00e-03 at step 4" in line


def test_a_schedule_that_ends_early_at_0_is_refused() -> None:
    arguments = ["--schedule.steps=6", "--train.steps=12"]
    with pytest.raises(UserError, match=r"schedule\.steps = 6: the learning rate is 0 from"):
        load(TINY, arguments)
    for more in ("--schedule.min_lr_fraction=0.1", "--schedule.decay_fraction=0"):
        load(TINY, [*arguments, more])
    with pytest.raises(UserError, match=r"schedule\.steps = -1"):
        load(TINY, ["--schedule.steps=-1"])


def test_a_run_resumes_with_another_balance(
    overrides: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    arguments = [*overrides, "--schedule.steps=20", "--checkpoint.every=0"]
    assert train(*arguments, "--train.steps=3") == 0
    before = checkpoint.read_manifest(folder / "checkpoints" / "step-00000003")
    changed = ["--model.moe.bias_update_rate=0", "--model.moe.seq_aux_loss_coef=0.01"]
    assert train(*arguments, "--train.steps=5", *changed) == 0
    out = capfd.readouterr().out
    assert "model.moe.bias_update_rate (was 0.01, is 0.0)" in out
    assert "model.moe.seq_aux_loss_coef (was 0.0, is 0.01)" in out
    assert "learning rate:" not in out, "the schedule is as long as it was"
    after = checkpoint.read_manifest(folder / "checkpoints" / "step-00000005")
    name = next(name for name in before.boxes if name.endswith("router.bias_E"))
    read = [checkpoint.Reader(m).read(name, m.boxes[name][0][0]) for m in (before, after)]
    assert read[0].abs().sum() > 0 and read[0].equal(read[1]), "at rate 0 the bias stays"
    lr = {r["step"]: r["lr"] for r in read_lines(folder / "metrics.jsonl")}
    assert lr[5] == lr[3] == 3e-3


def test_mtp_modules_come_and_go_with_given_weights(
    overrides: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The weights do not change here, so the loss of step 1 is that of the given weights."""
    still = [
        *overrides, "--optimizer.lr=0", "--model.moe.bias_update_rate=0", "--train.steps=1",
        "--schedule.warmup_steps=0",
    ]  # fmt: skip
    flat, deep = tmp_path / "run", tmp_path / "deep"
    assert train(*still, "--model.init_std=0.05") == 0
    (first,) = read_lines(flat / "metrics.jsonl")
    start = [*still, f"--run.dir={deep}", f"--checkpoint.init_from={flat}"]
    assert train(*start, "--model.mtp_depth=1") == 0
    assert "MTP modules 1 to 1: new, initialized from run.seed" in capfd.readouterr().out
    (second,) = read_lines(deep / "metrics.jsonl")
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert train(*start) == 2
    assert "cannot resume with another model.mtp_depth (was 1, is 0)" in capfd.readouterr().err
    back = [*still, f"--run.dir={tmp_path / 'back'}", f"--checkpoint.init_from={deep}"]
    assert train(*back) == 0
    assert "MTP modules 1 to 1: left out, this run has 0" in capfd.readouterr().out
    (third,) = read_lines(tmp_path / "back" / "metrics.jsonl")
    assert third["loss"] == pytest.approx(first["loss"], rel=1e-5)


def test_data_may_move_but_not_change(
    overrides: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A resume needs the same tokens, wherever their text and tokenizer are now."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    for name in ("a.py", "b.py"):
        (here / name).write_text("\n".join(f"def {name[0]}_{n}(): ..." for n in range(300)))
    arguments = [*overrides, "--checkpoint.every=0", "--schedule.steps=20"]
    assert train(*arguments, f"--data.source={here}", "--train.steps=2") == 0
    here.rename(there)
    kept = tmp_path / "run" / "tokenizer"
    moved = [f"--data.source={there}", f"--data.tokenizer={kept}"]
    assert train(*arguments, f"--data.source={there}", "--train.steps=3") == 0
    assert f"data.source (was '{here}', is '{there}')" in capfd.readouterr().out
    assert train(*arguments, *moved, "--train.steps=4") == 0
    assert "data.tokenizer (was '', is" in capfd.readouterr().out
    (there / "b.py").write_text("b = 1\n" * 3000)
    for then, cause in (
        (moved, f"the documents of data.source = '{there}' have changed"),
        ([*moved, "--data.text_field=other"], "with another data.text_field (was 'text'"),
    ):
        assert train(*arguments, *then, "--train.steps=5") == 2
        error = capfd.readouterr().err
        assert f"cannot resume: {cause}" in error and error.count("\n") == 1
        assert "the tokens are not those of its checkpoint" in error

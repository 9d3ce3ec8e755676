"""Loss spikes, the data that is left out after one, skipped steps, and their records."""

import random
from pathlib import Path

import pytest

from configs.health.settings import HealthConfig
from tests.train.in_process import train
from train import step as step_module
from train.health import skipped_steps, spikes
from train.health.skipped_steps import SkippedSteps
from train.health.spikes import LeftOutData, LossSpike, LossWatch
from train.report.metrics import read_lines
from train.step import NonFiniteError


def test_a_spike_is_noticed_and_noise_is_not() -> None:
    source = random.Random(0)
    watch = LossWatch(HealthConfig(spike_factor=6.0), [])
    for step in range(1, 2001):
        watch.add(step, 8.0 * step**-0.1 + source.gauss(0, 0.05))
    with pytest.raises(LossSpike, match=r"step 2001: the loss 5\.2000 is a spike"):
        watch.add(2001, 5.2)
    watch.add(2001, 8.0 * 2001**-0.1)  # the spike itself is not part of the statistics
    off = LossWatch(HealthConfig(), [1.0] * 64)
    off.add(65, 1e9)


def test_left_out_data_is_that_of_the_steps_and_of_no_others() -> None:
    """Against a list of the data steps that are left."""
    source = random.Random(1)
    for _ in range(200):
        data, left = LeftOutData([]), list(range(1, 200))
        for _ in range(source.randrange(1, 5)):
            first = source.randrange(1, 40)
            last = first + source.randrange(1, 9)
            data.add(first, last)
            del left[first - 1 : last]
            assert [data.data_step(step) for step in range(1, 60)] == left[:59]


def test_left_out_data_survives_in_its_file(tmp_path: Path) -> None:
    assert spikes.read(tmp_path) == ([], 0)
    data = LeftOutData([[3, 5]])
    data.add(2, 4)
    data.write(tmp_path, 2)
    intervals, rollbacks = spikes.read(tmp_path)
    assert LeftOutData(intervals).intervals == data.intervals == [(2, 7)] and rollbacks == 2
    for damaged in ("", "[]", '{"rollbacks": 1}', '{"rollbacks": 1, "intervals": [[5, 3]]}'):
        (tmp_path / spikes.LEFT_OUT).write_text(damaged)
        with pytest.raises((ValueError, KeyError, TypeError)):
            spikes.read(tmp_path)


def error(can_skip: bool = True) -> NonFiniteError:
    return NonFiniteError("step 9: the loss is nan on rank 1", True, can_skip)


def test_the_budget_of_skipped_steps_is_that_of_a_window(tmp_path: Path) -> None:
    limits = HealthConfig(max_skipped_steps=2, skip_window=10)
    skipped = SkippedSteps(limits, [], tmp_path)
    for step in (1, 5, 11, 15, 21):
        skipped.add(step, error())
        assert skipped.ends_with(step) and not skipped.ends_with(step + 1)
    with pytest.raises(NonFiniteError, match="nan on rank 1; steps 15, 21 were skipped before"):
        skipped.add(24, error())
    with pytest.raises(NonFiniteError):
        SkippedSteps(limits, [], None).add(1, error(can_skip=False))
    with pytest.raises(NonFiniteError):
        SkippedSteps(HealthConfig(max_skipped_steps=0), [], None).add(1, error())
    path = tmp_path / skipped_steps.SKIPPED
    with path.open("a") as file:
        file.write("damaged\n[1]\n" + '{"step": "x"}\n{"st')
    assert skipped_steps.read(tmp_path, 15) == [1, 5, 11, 15]
    assert skipped_steps.read(tmp_path, 99) == [1, 5, 11, 15], "later ones are removed"


def test_one_bad_step_changes_nothing_but_itself(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """NaN in step 3, and a resume in between: the state is that of step 2 for one step longer."""
    loss_sums, calls = step_module.loss_sums, []

    def bad(*arguments: object) -> object:
        calls.append(1)
        losses = loss_sums(*arguments)  # type: ignore[arg-type]
        return losses * float("nan") if len(calls) == 5 else losses  # 2 microbatches per step

    monkeypatch.setattr(step_module, "loss_sums", bad)
    arguments = [*overrides, "--checkpoint.every=3", "--schedule.steps=6", "--checkpoint.keep=9"]
    arguments += ["--train.micro_batch=4", "--validation.sequences=4"]
    assert train(*arguments, "--train.steps=4") == 0
    assert "step 3: the loss is nan on rank 0; " in capfd.readouterr().out
    assert train(*arguments, "--train.steps=6") == 0
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2, 4, 5, 6]
    assert [r.get("skipped_steps") for r in records] == [None] * 2 + [1.0] * 3
    folders = sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert "step-00000003" not in folders, "no checkpoint directly after a skipped step"

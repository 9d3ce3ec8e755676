"""`python -m train`: its output files, its refusals, the output of --check."""

import errno
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from configs.loader import load
from models.counts import parameter_counts
from tests.runs import PICTURES, ROOT, TINY, command, environment, run, started
from tests.train.in_process import run_train, train
from train.report.metrics import read_lines


def test_a_run_leaves_everything_behind(overrides: list[str], tmp_path: Path) -> None:
    done = run(
        "-m", "train", TINY, *overrides, "--validation.every=5", "--train.profile_steps=[3]",
        env=PICTURES,
    )  # fmt: skip
    folder = tmp_path / "run"
    records = read_lines(folder / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, 13))
    expected = {"loss", "grad_norm", "lr", "tokens_per_s", "step_s", "data_share", "memory_gib"}
    saves = {"checkpoint/blocked_s", "checkpoint/write_s"}
    balance = {
        f"moe/layer_{i}/{n}" for i in (0, 1) for n in ("max_vio", "load_entropy", "dead_experts")
    }
    assert all(
        r.keys() - saves == expected | balance | {"step"}
        for r in records
        if r["step"] not in (5, 10, 12)
    )
    assert {r["step"] for r in records if "checkpoint/blocked_s" in r} == {5, 9}, "saved before"
    assert [r["step"] for r in records if "validation_loss" in r] == [5, 10, 12]
    assert records[-1]["loss"] < records[0]["loss"]
    loads = read_lines(folder / "expert_load.jsonl")
    assert all(sum(layer) == 8 * 32 * 2 for record in loads for layer in record["load"])
    for name in ("loss.png", "experts.png", "config.toml", "tokenizer/tokenizer.json"):
        assert (folder / name).stat().st_size > 0
    trace = json.loads((folder / "profile" / "step-00000003-rank-00000.json").read_text())
    assert any("mm" in event.get("name", "") for event in trace["traceEvents"])
    attempt = json.loads((folder / "environment.json").read_text())[0]
    assert attempt["packages"]["torch"] and attempt["mesh"]["ep"] == 1
    assert done.stdout.count("\ndrew ") == 2
    assert "eta" in done.stdout and "validation loss" in done.stdout and "\x1b" not in done.stdout


def test_tensorboard_has_the_fields_of_the_metrics_file(
    overrides: list[str], tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_train(TINY, *overrides, "--train.steps=3")
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    names = {name for record in records for name in record} - {"step"}
    assert set(events.Tags()["scalars"]) == names
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([r["loss"] for r in records])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["absent.toml"], "absent.toml: no such file; did you mean configs/demo.toml?"),
        ([], "0 experiment files given"),
        ([str(TINY), "--model.moe.topk=2"], "did you mean model.moe.top_k?"),
        (
            [str(TINY), "--parallel.dp_shard=2"],
            "dp_replicate 1 x dp_shard 2 x tp 1 = 2, but there are 1",
        ),
        ([str(TINY), "--data.source=/absent/corpus"], "data.source"),
        ([str(TINY), "--checkpoint.init_from=/absent"], "/absent: no such folder"),
        ([str(TINY), "--ranks", "2"], "only with --check"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_exit_2(
    arguments: list[str], expected: str, overrides: list[str]
) -> None:
    rest = [o for o in overrides if not any(a.split("=")[0] in o for a in arguments[1:])]
    done = run_train(*arguments, *rest, code=2)
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stdout + done.stderr


def wait_until_signals_are_handled(pid: int) -> None:
    """SIGTERM, for which Python has no handler of its own; SIGINT may be ignored until then."""
    deadline, bit = time.monotonic() + 60, 1 << (signal.SIGTERM - 1)
    while (
        not int(re.findall(r"SigCgt:\s(\w+)", Path(f"/proc/{pid}/status").read_text())[0], 16) & bit
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_stop_before_there_is_anything_to_save_is_silent(overrides: list[str]) -> None:
    words = ["-m", "train", str(TINY), *overrides, "--train.steps=5000"]
    process = subprocess.Popen(
        command(*words), cwd=ROOT, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_until_signals_are_handled(process.pid)
    time.sleep(0.5)  # while torch is imported
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=25)
    with started(*words) as program:
        wait_until_signals_are_handled(program.pids[0])
        time.sleep(0.1)  # while the run is set up
        program.signal(signal.SIGINT)
        done = program.finish(25)
    for code, printed in ((process.returncode, errors), (done.returncode, done.stderr)):
        assert code in (-signal.SIGINT, 128 + signal.SIGINT), printed
        assert "Traceback" not in printed


def test_a_run_dir_that_is_a_file_is_one_line(overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run_train(TINY, *overrides, f"--run.dir={tmp_path / 'file'}", code=2)
    assert done.stderr.count("\n") == 1 and "file" in done.stderr
    done = run_train(TINY, *overrides, "--checkpoint.init_from=/absent", code=2)
    assert done.stderr == (
        "error: checkpoint.init_from: /absent: no such folder; name a run folder or one of its "
        "checkpoints\n"
    )
    done = run("-m", "train", TINY, *overrides, "--data.source=/absent", ranks=2, code=1)
    assert 'Traceback (most recent call last):\n  File "/' not in done.stdout
    assert done.stderr.count("error: data.source") == 1


@pytest.mark.parametrize("kind", ["file", "link", "full"])
def test_checkpoints_that_cannot_be_written_stop_a_run_before_it_trains(
    kind: str,
    overrides: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    place = tmp_path / "run" / "checkpoints"
    place.parent.mkdir()
    expected = "this is no folder; move it away"
    if kind == "file":
        place.write_text("")
    elif kind == "link":
        place.symlink_to(tmp_path / "nowhere")
    else:
        place.mkdir()
        expected, real = "cannot be written: No space left on device", os.mkdir

        def refuse(path: Any, *rest: Any) -> None:
            if Path(path).parent == place:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            real(path, *rest)

        monkeypatch.setattr(os, "mkdir", refuse)
    assert train(*overrides) == 2
    assert capfd.readouterr().err == f"error: {place}: {expected}\n"


def test_under_torchrun_rank_0_alone_prints_the_line(overrides: list[str]) -> None:
    for wrong, expected, fresh in (
        ("--parallel.dp_shard=3", "dp_shard 3 x tp 1 = 3, but there are 2 ranks", True),
        ("--train.stpes=3", "did you mean train.steps?", False),  # before ranks are counted
    ):
        done = run("-m", "train", TINY, *overrides, wrong, ranks=2, code=1, fresh=fresh)
        lines = [line for line in done.stderr.splitlines() if line.startswith(("error:", "rank"))]
        assert len(lines) == 1 and expected in lines[0], lines


def test_too_little_text_is_one_line(overrides: list[str]) -> None:
    done = run_train(TINY, *overrides, "--data.seq_len=100000", code=2)
    assert "data.seq_len = 100000: the" in done.stderr and done.stderr.count("\n") == 1


SMALL = ["--model.n_layers=1", "--model.n_dense_layers=0", "--check"]


@pytest.fixture(scope="module")
def plain(corpus: Path) -> str:
    """What the check of a small model prints."""
    return run_train(TINY, f"--data.source={corpus}", *SMALL).stdout


def test_check_prints_everything_and_starts_nothing(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run_train("configs/demo.toml", "--check", "--ranks", 2)
    for expected in ("[model.moe]", "8,923,648", "4,205,056", "ep                2", "Glm4Moe",
                     "FLOPs / token", "2,048", "bytes per rank"):  # fmt: skip
        assert expected in done.stdout
    monkeypatch.setattr("train.check._bytes_per_rank", lambda *_: [])  # takes a second
    done = run_train(TINY, *overrides, *SMALL, "--stages", "--ranks=2")
    table = done.stdout.split("ZeRO stages on GPUs")[1]
    assert len(re.findall(r"^  [123] +[123] +[\d.,]+ [KM]iB .*/s", table, re.MULTILINE)) >= 3, table
    assert table.count("   as set") == 1
    done = run_train(TINY, *overrides, "--check", "--ranks=3", code=2)
    assert "3 data ranks" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_forced_balance_is_said_everywhere(
    overrides: list[str], tmp_path: Path, plain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced = [*overrides, "--model.moe.force_balance=true", "--train.steps=2"]
    done = run_train(TINY, *forced)
    lines = done.stdout.splitlines()
    reports = [line for line in lines if line.startswith(("step ", "FORCED"))]
    assert len(reports) == 4, "introduction, two steps, validation"
    assert all("FORCED BALANCE" in line for line in reports)
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [r["force_balance"] for r in records] == [1.0, 1.0]
    monkeypatch.setattr("train.check._bytes_per_rank", lambda *_: [])  # takes a second
    assert "FORCED BALANCE" in run_train(TINY, *forced, *SMALL).stdout
    assert "FORCED BALANCE" not in plain and "MTP" not in plain


def test_check_prints_mtp_modules_apart(overrides: list[str], plain: str) -> None:
    deep = run_train(TINY, *overrides, *SMALL, "--model.mtp_depth=1").stdout
    totals = [out.split("  parameters")[1].split()[0] for out in (deep, plain)]
    assert totals[0] == totals[1]
    model = load(TINY, [*SMALL[:-1], "--model.mtp_depth=1"]).model
    assert f"MTP modules   {parameter_counts(model).mtp:>15,}" in deep
    sums = [float(out.split("bytes per rank")[1].split("parameters")[1].split()[0])
            for out in (deep, plain)]  # fmt: skip
    assert sums[0] > sums[1], "their memory counts"


def test_a_non_finite_loss_stops_before_the_step_and_names_it(
    overrides: list[str], tmp_path: Path
) -> None:
    arguments = [*overrides, "--optimizer.lr=1e38", "--train.clip_norm=0", "--checkpoint.every=1"]
    done = run("-m", "train", TINY, *arguments, ranks=2, code=1)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "stopped before the optimizer step" in lines[0]
    step = int(lines[0].split("step ")[1].split(":")[0])
    assert "rank 0" in lines[0]
    assert not (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").exists()


def test_the_step_loop_fits_a_screen() -> None:
    source = (ROOT / "train" / "trainer.py").read_text()
    body = source.split("    def run(self)")[1].split("\n    def ")[0]
    assert len(body.splitlines()) <= 45

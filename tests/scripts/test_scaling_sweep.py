"""Scaling sweeps: their points, as SLURM jobs in place of which a scheduler in this process runs,
and what follows when a point fails. tests/launch/test_slurm_cluster.py has a real SLURM."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs.errors import UserError
from configs.loader import load, to_toml
from launch import cluster
from launch.run_folder import read_submission
from scripts.scaling_sweep import __main__ as command
from scripts.scaling_sweep import local, slurm
from scripts.scaling_sweep.points import points_of
from tests.runs import ROOT, TINY, environment

SITE = '[node]\ngpu = "H100-80GB"\ngpus = 4\ncpus = 32\n'


class Scheduler:
    """Starts one job at a time, and lets it train until its end or its failure."""

    def __init__(self, failing: dict[str, tuple[str, int]]) -> None:
        """failing: state and exit code of the first job of a point, by the point's name."""
        self.failing = failing
        self.submitted: list[tuple[str, str | None]] = []
        self.running: dict[str, Path] = {}
        self.cancelled: list[str] = []
        self.states: dict[str, tuple[str, int]] = {}

    def sbatch(self, script: Path, *, after: str | None = None) -> str:
        run, job = script.parent.parent, str(100 + len(self.submitted))
        self.submitted.append((run.name, after))
        self.running[job] = run
        return job

    def queue(self, jobs: Sequence[str]) -> dict[str, str]:
        found = {job: "RUNNING" for job in jobs if job in self.running}
        if found:
            self._train(next(iter(found)))
        return found

    def ended(self, job: str) -> tuple[str, int]:
        return self.states.get(job, ("COMPLETED", 0))

    def scancel(self, job: str) -> None:
        self.cancelled.append(job)
        self.running.pop(job, None)

    def _train(self, job: str) -> None:
        run = self.running.pop(job)
        words = (run / "launch" / "train.sbatch").read_text()
        forced = "force_balance=true" in words
        changes = ["train.steps=6", "train.profile_steps=[6]", f"run.dir={run}"]
        changes.append(f"model.moe.force_balance={str(forced).lower()}")
        (run / "config.toml").write_text(to_toml(load(TINY, [f"--{c}" for c in changes])))
        steps = 6
        if state := self.failing.pop(run.name, None):
            self.states[job], steps = state, 3
            (run / "launch" / f"{job}-0-1-noden1.log").write_text("x\nerror: no memory\ny\n")
        lines = [json.dumps({"step": i + 1, "loss": 1.0}) + "\n" for i in range(steps)]
        (run / "metrics.jsonl").write_text("".join(lines))


def swept(
    out: Path, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, *words: str
) -> tuple[int, list[list[str]]]:
    """Exit code of a sweep of 1 and 2 ranks, and the arguments of the reports."""
    for name in ("sbatch", "queue", "ended", "scancel"):
        monkeypatch.setattr(cluster, name, getattr(scheduler, name))
    monkeypatch.setattr(slurm, "POLL_S", 0.0)
    reports: list[list[str]] = []

    def report(words: list[str]) -> int:
        reports.append(words)
        return 0

    module = SimpleNamespace(main=report)  # the real one loads torch
    monkeypatch.setitem(sys.modules, "scripts.scaling_report.__main__", module)
    code = command.main(
        [str(TINY), f"--out={out}", "--ranks=1,2", "--repeats=2", "--train.steps=6", "--slurm",
         *words]
    )  # fmt: skip
    return code, reports


def test_points_are_jobs_in_interleaved_order_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = Scheduler({})
    code, reports = swept(tmp_path / "out", scheduler, monkeypatch)
    assert code == 0
    names = [f"{routing}-{n}-{repeat}" for repeat in (0, 1) for n in (1, 2)
             for routing in ("natural", "forced")]  # fmt: skip
    after = [None, *(str(100 + i) for i in range(7))]
    assert scheduler.submitted == list(zip(names, after, strict=True))
    assert reports == [
        [*(f"{tmp_path}/out/{name}" for name in names), f"--out={tmp_path}/out-report"]
    ]
    script = (tmp_path / "out" / "natural-2-0" / "launch" / "train.sbatch").read_text()
    assert "#SBATCH --nodes=2\n" in script and "--nproc-per-node 1 " in script
    assert swept(tmp_path / "out", scheduler, monkeypatch)[0] == 0
    assert len(scheduler.submitted) == 8, "complete points are not repeated"
    scheduler = Scheduler({})
    assert swept(tmp_path / "free", scheduler, monkeypatch, "--at-once")[0] == 0
    assert {after for _, after in scheduler.submitted} == {None}


def test_a_failed_job_is_one_line_and_the_same_command_repeats_it_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scheduler = Scheduler({"forced-1-1": ("FAILED, exit code 1", 1)})
    code, reports = swept(tmp_path, scheduler, monkeypatch)
    said = capsys.readouterr()
    assert code == 1 and not reports and len(scheduler.submitted) == 8
    (line,) = [line for line in said.out.splitlines() if "error" in line]
    assert line.endswith(
        "error: forced-1-1: job 105 ended (FAILED, exit code 1) after step 3 of 6; "
        f"{tmp_path}/forced-1-1/launch/105-0-1-noden1.log: error: no memory"
    )
    assert said.err.startswith("error: 1 of 8 points failed: forced-1-1; no report")
    code, reports = swept(tmp_path, scheduler, monkeypatch)
    assert code == 0 and reports and scheduler.submitted[8:] == [("forced-1-1", None)]
    assert read_submission(tmp_path / "forced-1-1").jobs == ["105", "108"]


def test_a_wrong_setting_cancels_the_other_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scheduler = Scheduler({"forced-1-0": ("FAILED, exit code 2", 2)})
    assert swept(tmp_path, scheduler, monkeypatch)[0] == 2
    assert scheduler.cancelled == ["107", "106", "105", "104", "103", "102"]
    assert "the other jobs were cancelled" in capsys.readouterr().out


def test_jobs_in_the_queue_are_waited_for_and_slurm_may_be_silent_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scheduler = Scheduler({})
    queue, asked = scheduler.queue, [0]

    def flaky(jobs: Sequence[str]) -> dict[str, str]:
        asked[0] += 1
        if asked[0] in (3, 4):
            raise UserError("squeue refused: no answer")
        if asked[0] == 6:
            raise KeyboardInterrupt
        return queue(jobs)

    monkeypatch.setattr(scheduler, "queue", flaky)
    assert swept(tmp_path, scheduler, monkeypatch, "--at-once")[0] == 130
    said = capsys.readouterr()
    assert said.out.count("squeue refused: no answer; asked again") == 1
    left = [*scheduler.running]
    assert left and f" {' '.join(left)}` removes them" in said.err and " 100 " not in said.err
    assert swept(tmp_path, scheduler, monkeypatch)[0] == 0
    assert len(scheduler.submitted) == 8 and "submitted before" in capsys.readouterr().out


def test_ranks_are_those_of_a_part_of_a_node_or_of_whole_nodes(tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    site.write_text(SITE)
    points = points_of(
        str(TINY), ["--train.global_batch=32"], [1, 4, 8], 1, tmp_path / "x", is_weak=False
    )
    options: dict[str, object] = dict.fromkeys(
        ("partition", "account", "qos", "time", "constraint", "exclude")
    )
    found = slurm.read_points(str(TINY), points, options | {"site": site})
    sizes = [(run.job.nodes, run.site.node.ranks, run.site.node.threads_per_rank) for run in found]
    assert sizes == [(1, 1, 8)] * 2 + [(1, 4, 8)] * 2 + [(2, 4, 8)] * 2
    assert "#SBATCH --gres=gpu:4" in found[0].scripts()[0], "the whole node"
    points = points_of(str(TINY), ["--train.global_batch=24"], [6], 1, None, is_weak=False)
    with pytest.raises(UserError, match="--ranks 6: a node has 4 ranks"):
        slurm.read_points(str(TINY), points, options | {"site": site})


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--ranks=1,x"], "--ranks 1,x: must be a number"),
        (["--ranks=0"], "--ranks 0: must be a number"),
        (["--ranks=1,1"], "--ranks 1,1: a number is given twice"),
        (["--run.dir=x"], "--run.dir=x: every point has its own"),
        (["--checkpoint.dir=x"], "--checkpoint.dir=x: every point has its own"),
        (["--model.moe.force_balance=true"], "every point has its own"),
        (["--train.steps=0"], "train.steps = 0: must lie between"),
        (["--train.steps=5"], "train.steps = 5: a point needs at least 6"),
        (["--repeats=0"], "--repeats 0: must be"),
        (["--repeats=101"], "--repeats 101: must lie"),
        (["--ranks=3"], "must be a multiple of"),
        (["--model.moe.topk=1"], "did you mean model.moe.top_k?"),
        (["runs/x"], "'runs/x': neither an option nor"),
        (["--partition=x"], "--partition: needs --slurm"),
        (["--dry-run"], "--dry-run: needs --slurm"),
        (["--out=/"], "--out = '/': leads to the root"),
        (["--slurm", "--partition=a;b", "--ranks=1"], "partition = 'a;b': must"),
        (["--slurm", "--site=absent.toml", "--ranks=1"], "absent.toml: no such file"),
    ],
    ids=str,
)
def test_a_wrong_sweep_is_one_line(
    words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(TINY), f"--out={tmp_path / 'out'}", *words]) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_run_with_other_settings_is_not_taken_for_a_point(tmp_path: Path) -> None:
    (tmp_path / "natural-1-0").mkdir()
    (tmp_path / "natural-1-0" / "config.toml").write_text(to_toml(load(TINY, ["--run.seed=7"])))
    with pytest.raises(UserError, match=r"natural-1-0: has a run with run\.seed = 7"):
        points_of(str(TINY), [], [1], 1, tmp_path, is_weak=False)
    (point, _) = points_of(str(TINY), [], [1], 1, None, is_weak=False)
    assert point.folder == Path("runs/tiny-scaling/natural-1-0")


@pytest.mark.parametrize(
    ("codes", "expected", "started"), [((1, 0), 1, 4), ((2,), 2, 1), ((0, 75), 75, 2)]
)
def test_local_points_go_on_after_a_failure_but_not_after_a_stop(
    codes: tuple[int, ...], expected: int, started: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    calls: list[list[str]] = []

    def run(words: list[str]) -> subprocess.CompletedProcess[str]:
        calls.append(words)
        code = codes[len(calls) - 1] if len(calls) <= len(codes) else 0
        return subprocess.CompletedProcess(words, code)

    monkeypatch.setattr(local.subprocess, "run", run)
    points = points_of(str(TINY), [], [1, 2], 1, tmp_path, is_weak=True)
    assert local.run(str(TINY), points) == expected
    assert len(calls) == started
    assert ("1 of 4 points failed: natural-1-0" in capsys.readouterr().err) is (expected == 1)
    assert calls[0][2:5] == ["launch.local", str(TINY), "--nproc=1"]
    assert "--train.global_batch=8" in calls[0]


def test_planning_loads_no_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch was loaded')")
    done = subprocess.run(
        [sys.executable, "-m", "scripts.scaling_sweep", str(TINY), "--ranks=1", "--slurm",
         "--dry-run", "--repeats=1"],
        cwd=ROOT, capture_output=True, text=True,
        env=environment() | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.count("#!/bin/bash") == 2, done.stderr

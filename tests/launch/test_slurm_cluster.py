"""`python -m launch.slurm` on a real SLURM cluster of two nodes (tests/launch/slurm_cluster.py):
pre-emption, end of time, a killed node, cancellation and refusals. The curve of each run equals
that of an uninterrupted one bit for bit."""

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from launch import slurm
from launch.run_folder import records
from tests.launch import slurm_cluster
from tests.launch.slurm_cluster import SlurmCluster
from tests.runs import ROOT, TINY, environment, free_port, run

pytestmark = pytest.mark.skipif(slurm_cluster.is_skipped(), reason=slurm_cluster.missing() or "-")
slow = pytest.mark.slow
SITE = """\
[slurm]
signal_s = 50
[node]
ranks = 1
cpus = 1
threads = 1
interface = "lo"
[software]
environment = ["OPENBLAS_NUM_THREADS=1", "CUDA_VISIBLE_DEVICES="]
"""
ENDLESS = ["--train.steps=100000", "--schedule.steps=100000", "--checkpoint.every=5"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    root = tmp_path_factory.mktemp("slurm")
    for folder in (root, *list(root.parents)[:2]):
        folder.chmod(0o755)  # munge requires that all users may enter
    running = SlurmCluster(root)
    try:
        yield running
    finally:
        running.stop()


class Run:
    """One run of tests/tiny.toml on the cluster."""

    def __init__(self, cluster: SlurmCluster, folder: Path, overrides: list[str]) -> None:
        self.cluster, self.folder = cluster, folder / "run"
        self.overrides = [*overrides, *ENDLESS]
        self.site = folder / "site.toml"
        self.site.write_text(SITE)

    def launch(self, *words: str, code: int = 0) -> str:
        """What the command prints; in this process, because there are many of them."""
        out, errors = StringIO(), StringIO()
        with (
            mock.patch.dict(os.environ, environment() | self.cluster.env, clear=True),
            contextlib.chdir(ROOT), redirect_stdout(out), redirect_stderr(errors),
        ):  # fmt: skip
            found = slurm.main([*words])
        said = out.getvalue() + errors.getvalue()
        assert found == code, said
        assert code == 0 or errors.getvalue().count("\n") == 1, said
        return said

    def submit(self, *options: str, nodes: int = 2, code: int = 0) -> list[str]:
        said = self.launch(
            str(TINY), "--nodes", str(nodes), "--site", str(self.site), *options, *self.overrides,
            code=code,
        )  # fmt: skip
        if code:
            return [said]
        found = re.search(r"^job (.*)$", said, re.MULTILINE)
        assert found and f"logs {self.folder}/launch" in said
        return found[1].split(", ")

    def saved(self) -> int:
        steps = [int(path.name[5:]) for path in (self.folder / "checkpoints").glob("step-*")]
        return max(steps, default=0)

    def starts(self) -> int:
        path = self.folder / "environment.json"
        return len(json.loads(path.read_text())) if path.is_file() else 0

    def wait_for_step(self, step: int) -> None:
        self.cluster.wait(lambda: self.saved() >= step, f"checkpoint {step}", 240)

    def logs(self) -> str:
        logs = sorted((self.folder / "launch").rglob("*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in logs)

    def cancel(self, *jobs: str) -> None:
        assert self.launch("cancel", str(self.folder)).startswith("cancelled ")
        self.cluster.wait(lambda: not any(map(self.cluster.state, jobs)), "end of the job", 60)
        assert self.launch("cancel", str(self.folder)) == "no job of this run is left\n"

    def check_curve(self, tmp_path: Path) -> None:
        """Every recorded loss equals that of an uninterrupted run with two ranks, bit for bit."""
        found = [record["loss"] for record in records(self.folder)]
        assert [r["step"] for r in records(self.folder)] == list(range(1, len(found) + 1))
        whole = tmp_path / "whole"
        words = [*self.overrides, f"--run.dir={whole}", f"--train.steps={len(found)}"]
        run("-m", "train", TINY, *words, "--checkpoint.every=0", ranks=2)
        assert [record["loss"] for record in records(whole)] == found


@pytest.fixture
def job(cluster: SlurmCluster, tmp_path: Path, overrides: list[str]) -> Iterator[Run]:
    yield Run(cluster, tmp_path, overrides)
    cluster.cancel_all()  # a test that failed would occupy the nodes of the next


@slow
def test_a_pre_empted_run_saves_is_queued_again_and_resumes(job: Run, tmp_path: Path) -> None:
    (number,) = job.submit()
    job.wait_for_step(10)
    status = job.launch("status", str(job.folder))
    assert f"{number} RUNNING" in status and re.search(r"step +\d+ of 100000", status), status
    assert "tokens/s" in status and re.search(r"starts +1\n", status)
    sent = job.cluster.run("sbatch", "-p", "high", "-N2", "--exclusive", "--wrap", "sleep 1",
                           "--output=/dev/null", "--parsable")  # fmt: skip
    job.cluster.wait(lambda: job.cluster.state(number) == "PENDING", "requeue")
    job.cluster.wait(lambda: not job.cluster.state(sent.strip()), "end of the other job")
    stopped = job.saved()
    assert re.search(rf"saved \S*step-{stopped:08}", job.logs()), job.logs()
    job.cluster.start_now(number)
    job.wait_for_step(stopped + 15)
    assert job.starts() == 2 and "restart 1, attempt 1" in job.logs()
    job.cancel(number)
    assert not (job.folder / "launch" / "failed_nodes").exists(), "pre-emption is no fault"
    job.check_curve(tmp_path)


@slow
def test_end_of_time_is_signaled_and_the_chained_job_continues(job: Run, tmp_path: Path) -> None:
    first, second = job.submit("--jobs=2", "--time=00:02:00")
    assert job.cluster.state(second) == "PENDING"
    # on a busy machine its start may take longer than the time before its signal
    job.cluster.run("scontrol", "update", f"jobid={second}", "TimeLimit=30")
    job.wait_for_step(5)
    job.cluster.wait(lambda: not job.cluster.state(first) or job.starts() > 1, "end of time", 210)
    assert "end of time: the ranks save and stop" in job.logs()
    assert "the next job of the chain continues" in job.logs()
    stopped = job.saved()
    job.wait_for_step(stopped + 5)
    assert job.starts() == 2
    job.cancel(second)
    job.check_curve(tmp_path)


@slow
@pytest.mark.parametrize(
    ("node", "is_noticed"), [("n2", True), ("n2", False), ("n1", True)],
    ids=["noticed", "not-noticed", "first-node"],
)  # fmt: skip
def test_a_killed_node_ends_the_attempt_and_the_job_is_queued_again(
    node: str, is_noticed: bool, job: Run, tmp_path: Path
) -> None:
    """The first node has the job's shell and the rendezvous."""
    (number,) = job.submit()
    job.wait_for_step(10)
    job.cluster.kill_node(node, is_noticed=is_noticed)
    job.cluster.wait(lambda: job.cluster.state(number) == "PENDING", "requeue")
    job.cluster.start_node(node)
    job.cluster.wait(lambda: job.cluster.idle() == 2, "two idle nodes")
    stopped = job.saved()
    # A late message about the first start would count as one about the second (SLURM 22.05 then
    # has one node for two), which the two minutes that SLURM waits after a requeue prevent.
    time.sleep(20)
    job.cluster.start_now(number)
    job.wait_for_step(stopped + 15)
    job.cancel(number)
    job.check_curve(tmp_path)


@slow
def test_a_rank_that_dies_is_restarted_in_the_same_job_and_its_node_is_named(
    job: Run, tmp_path: Path
) -> None:
    (number,) = job.submit()
    job.wait_for_step(10)
    wanted = {f"SLURM_JOB_ID={number}".encode(), b"SLURMD_NODENAME=n2", b"RANK=1"}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found = set((folder / "environ").read_bytes().split(b"\0"))
        except OSError:
            continue
        if wanted <= found:
            os.kill(int(folder.name), signal.SIGKILL)
    job.cluster.wait(lambda: job.starts() == 2, "second attempt")
    job.wait_for_step(job.saved() + 10)
    assert job.cluster.state(number) == "RUNNING"
    assert "restart 0, attempt 2" in job.logs()
    failed = (job.folder / "launch" / "failed_nodes").read_text().split()
    assert len(failed) == 1 and failed[0] in slurm_cluster.NODES
    refused = job.submit(code=2)[0]
    assert f"job {number} of this run is still queued or running" in refused
    job.cancel(number)
    job.check_curve(tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("resumes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_cancelled_run_saves_and_resumes_and_refusals_are_one_line(
    resumes: bool, job: Run, tmp_path: Path
) -> None:
    """The short form, which continuous integration runs; the others are slow. By default a
    resumed job is only queued, behind another."""
    expected = "error: sbatch refused: "
    assert expected in job.submit("--partition=absent", code=2)[0]
    too_many = job.submit("--train.global_batch=16", nodes=4, code=2)[0]
    assert expected in too_many and "node" in too_many.lower(), too_many
    assert expected in job.submit("--constraint=gold", code=2)[0]
    assert not (job.folder / "launch" / "submission.json").exists()
    (first,) = job.submit()
    assert f"job {first} of this run is still queued or running" in job.submit(code=2)[0]
    assert len(job.cluster.run("squeue", "-h").splitlines()) == 1, "nothing else was submitted"
    job.wait_for_step(5)
    job.cancel(first)
    stopped = job.saved()
    assert re.search(rf"saved \S*step-{stopped:08}", job.logs()), job.logs()
    if not resumes:
        other = job.cluster.run("sbatch", "-p", "high", "-N2", "--exclusive", "--wrap", "sleep 600",
                                "--output=/dev/null", "--parsable").strip()  # fmt: skip
        job.cluster.wait(lambda: job.cluster.state(other) == "RUNNING", "the other job")
    said = job.launch("resume", str(job.folder))
    second = re.search(r"^job (\d+)$", said, re.MULTILINE)
    assert second and second[1] != first
    if resumes:
        job.wait_for_step(stopped + 5)
        assert job.starts() == 2
    else:
        assert job.cluster.state(second[1]) == "PENDING"
    job.cancel(second[1])
    job.check_curve(tmp_path)


@slow
def test_a_sweep_is_a_job_array_with_a_table_of_its_results(job: Run) -> None:
    words = ["sweep", str(TINY), "--nodes=1", "--site", str(job.site), "--set", "run.seed=1,2"]
    said = job.launch(*words, *job.overrides[:3], "--train.steps=3")
    number = said.split("job ")[1].split(",")[0]
    job.cluster.wait(lambda: not job.cluster.state(number), "end of the array", 240)
    table = (job.folder / "results.md").read_text()
    assert "| seed=1 | 3 |" in table and "| seed=2 | 3 |" in table, job.logs()
    assert job.launch("results", str(job.folder)) == table


@slow
def test_a_scaling_sweep_runs_its_points_in_order_and_repeats_a_cancelled_one_only(
    job: Run, tmp_path: Path
) -> None:
    words = ["-m", "scripts.scaling_sweep", str(TINY), f"--out={tmp_path / 'points'}", "--slurm",
             f"--site={job.site}", "--ranks=1,2", "--repeats=1", "--train.steps=6",
             "--checkpoint.every=0", *job.overrides[:2]]  # fmt: skip
    start: Any = {
        "args": [sys.executable, *words], "cwd": ROOT, "env": environment() | job.cluster.env,
        "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT,
    }  # fmt: skip
    with subprocess.Popen(**start) as sweep:
        queued = job.cluster.wait_for(
            lambda: job.cluster.run("squeue", "-h", "-o", "%i %j %r").splitlines(), 4, "jobs"
        )
        doomed = next(line.split()[0] for line in queued if "forced-1-0" in line)
        assert sum("Dependency" in line for line in queued) == 3, queued
        job.cluster.run("scancel", doomed)
        said, _ = sweep.communicate(timeout=400)
    assert sweep.returncode == 1, said
    assert f"error: forced-1-0: job {doomed} ended (CANCELLED) after step 0 of 6" in said
    assert "1 of 4 points failed: forced-1-0; no report" in said
    ends = [
        (tmp_path / "points" / name / "metrics.jsonl").stat().st_mtime
        for name in ("natural-1-0", "natural-2-0", "forced-2-0")
    ]
    assert ends == sorted(ends), "one after the other"
    again = subprocess.run(**start)
    assert again.returncode == 0, again.stdout
    assert again.stdout.count(": complete\n") == 3 and "wrote " in again.stdout
    report = json.loads((tmp_path / "points-report" / "report.json").read_text())
    assert [(p["ranks"], p["repeats"]) for p in report["points"]] == [(1, 1), (2, 1)] * 2


def _answer(port: int, path: str = "completions") -> dict[str, Any]:
    """The response to a greedy request, or {} if there is none yet."""
    body = {"model": "tiny", "prompt": "def value", "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/{path}", json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            found: dict[str, Any] = json.load(response)
            return found
    except OSError:
        return {}


@slow
@pytest.mark.skipif(
    importlib.util.find_spec("sglang_router") is None, reason="pip install sglang-router"
)
def test_a_served_model_answers_through_the_router_and_an_engine_is_replaced(job: Run) -> None:
    from tests.serve.conftest import write_export  # imports the engine

    export = job.folder.parent / "tiny"
    write_export(export)
    port = free_port()
    said = job.launch(
        "serve", str(export), "--nodes=2", f"--run={job.folder}", f"--port={port}",
        f"--site={job.site}", "--device=cpu", "--kv-tokens=1024",
    )  # fmt: skip
    number = said.split("job ")[1].split("\n")[0]
    job.cluster.wait(lambda: bool(_answer(port)), "answer of the router", 180)
    text = _answer(port)["choices"][0]["text"]
    for at in (port + 1, port + 2):
        job.cluster.wait(lambda at=at: bool(_answer(at)), "answer of the engine", 180)  # type: ignore[misc]
        assert _answer(at)["choices"][0]["text"] == text
    assert f"http://127.0.0.1:{port}/v1\n" in job.launch("status", str(job.folder))
    job.cluster.wait(lambda: _workers(port) == 2, "router with both engines", 180)
    doomed = [
        int(folder.name)
        for folder in Path("/proc").glob("[0-9]*")
        if (words := _words_of(folder))[-1:] == [str(port + 2)] and "-u" in words
    ]
    assert len(doomed) == 1, "the rank of engine 1"
    os.kill(doomed[0], signal.SIGKILL)
    assert [_answer(port)["choices"][0]["text"] for _ in range(8)] == [text] * 8
    job.cluster.wait(lambda: "engine 1, attempt 1: ended" in job.logs(), "end of engine 1")
    job.cluster.wait(lambda: bool(_answer(port + 2)), "answer of the new engine", 180)
    job.cancel(number)
    assert "queued again" not in job.logs() and "attempt 3" not in job.logs()


def _workers(port: int) -> int:
    """Engines that the router knows to be healthy."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/workers", timeout=10) as response:
        return sum(worker["is_healthy"] for worker in json.load(response)["workers"])


def _words_of(process: Path) -> list[str]:
    try:
        return (process / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []

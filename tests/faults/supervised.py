"""A training under the supervisor, its ranks, and faults in them."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.inject_faults.__main__ import main as inject
from tests.runs import ROOT, TINY, environment
from train.report.metrics import read_lines

PATIENT = ["--attempts-without-progress=1000", "--restarts-per-hour=10000", "--backoff=0"]
MESHES = {
    2: ["--parallel.ep=2"], 4: ["--parallel.tp=2", "--parallel.ep=2"],
    1: [],
}  # fmt: skip
"""FSDP with expert parallelism, on 4 ranks with tensor parallelism too."""
INJECTED = "--module=scripts.inject_faults.rank"


class Supervised:
    """`python -m launch.local`, in its own session."""

    def __init__(self, folder: Path, ranks: int, words: list[str]) -> None:
        """folder: of the run. words: options and overrides."""
        self.folder, self.ranks = folder, ranks
        self.log = folder.parent / f"{folder.name}.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "launch.local", str(TINY), f"--nproc={ranks}",
                 f"--run.dir={folder}", *MESHES[ranks], *words],
                cwd=ROOT, env=environment(), stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    @property
    def said(self) -> str:
        """All output so far."""
        return self.log.read_text(errors="replace")

    def pids(self) -> dict[int, int]:
        """Process ids of the ranks that run now."""
        pid = self.process.pid
        found = {}
        for child in _read(f"/proc/{pid}/task/{pid}/children").split():
            variables = _read(f"/proc/{int(child)}/environ").split(b"\0")
            rank = [v for v in variables if v.startswith(b"RANK=")]
            command = _read(f"/proc/{int(child)}/cmdline")
            if command and b"train.process" not in command and (rank or self.ranks == 1):
                found[int(rank[0][5:]) if rank else 0] = int(child)
        return found

    def wait_for(self, pattern: str, seconds: float = 60.0, start: int = 0) -> re.Match[str]:
        """Wait until the output has a text, from position `start` on."""
        deadline = time.monotonic() + seconds
        while not (found := re.compile(pattern).search(self.said, start)):
            assert time.monotonic() < deadline, f"no {pattern!r} in:\n{self.said[-3000:]}"
            assert self.process.poll() is None, f"ended before {pattern!r}:\n{self.said[-3000:]}"
            time.sleep(0.02)
        return found

    def wait_for_step(self, seconds: float = 60.0, start: int = 0) -> None:
        """Wait for a further step."""
        self.wait_for(r"(?m)^step +\d+/", seconds, start)

    def inject(self, *words: object) -> None:
        """Run `python -m scripts.inject_faults` in this process."""
        assert inject([str(self.folder), *map(str, words)]) == 0

    def finish(self, seconds: float = 120.0) -> int:
        """Wait for the end; returns the exit code."""
        return self.process.wait(seconds)


def _read(path: str) -> bytes:
    """A file of /proc; empty if the process has ended."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


@contextmanager
def supervised(folder: Path, ranks: int, words: list[str]) -> Iterator[Supervised]:
    """A running training; all of its processes are killed at the end."""
    run = Supervised(folder, ranks, words)
    try:
        yield run
    finally:
        kill_all(run)


def kill_all(run: Supervised) -> None:
    """kill -9 of the supervisor, its server and all ranks."""
    pids = [*run.pids().values(), run.process.pid]
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    run.process.wait(30)


def losses(folder: Path) -> dict[int, float]:
    """The recorded losses by step."""
    return {r["step"]: r["loss"] for r in read_lines(folder / "metrics.jsonl")}


def final_weights(folder: Path) -> dict[str, bytes]:
    """The files of the newest checkpoint."""
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}

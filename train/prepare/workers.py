"""Processes that work on units: `python -m train.prepare.workers FOLDER`, driven by JSON lines.

The parent writes {"stage": "scan" or "encode", "unit": N} to a worker's standard input and reads
{"unit": N, "found": counts} or {"error": line} from its standard output. A worker ends when its
parent does. With one process the parent does the work itself.
"""

import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from configs.errors import UserError
from train.data.progress import SECONDS
from train.prepare.encoding import encode, open_encoder
from train.prepare.plan import Plan, read_plan
from train.prepare.scanning import scan
from train.prepare.selection import load_decisions

_PR_SET_PDEATHSIG = 1
ROOT = Path(__file__).resolve().parent.parent.parent
Log = Callable[[str], None]


class Worker:
    """Runs units of one preparation in this process."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.plan = read_plan(work)
        self._encode: Callable[[int], dict[str, Any]] | None = None

    def run(self, stage: str, number: int) -> dict[str, Any]:
        """Run one unit; returns its counts. Raises UserError and OSError."""
        if stage == "scan":
            return scan(self.plan, self.work, number)
        if self._encode is None:
            units = range(len(self.plan.units))
            counts = [read_counts(self.work, "scan", n)["documents"] for n in units]
            decisions = load_decisions(self.work, counts)
            encoder, _ = open_encoder(self.work)
            self._encode = lambda n: encode(self.plan, self.work, n, decisions, encoder)
        return self._encode(number)


def read_counts(work: Path, stage: str, number: int) -> dict[str, Any]:
    """The counts of a finished unit. Raises FileNotFoundError."""
    counts: dict[str, Any] = json.loads((work / stage / f"{number}.json").read_text("utf-8"))
    return counts


def run_stage(plan: Plan, work: Path, stage: str, n_processes: int, log: Log) -> list[Any]:
    """Run all units of a stage that are not done; returns the counts of all.

    Raises UserError if a unit fails.
    """
    (work / stage).mkdir(exist_ok=True)
    units = range(len(plan.units))
    todo = [n for n in units if not (work / stage / f"{n}.json").is_file()]
    total = sum(unit.size for unit in plan.units)
    if todo and len(todo) < len(units):
        log(f"{stage}: {len(units) - len(todo):,} of {len(units):,} parts are there already")
    progress = _Progress(stage, total, sum(plan.units[n].size for n in todo), log)
    n_processes = min(n_processes, len(todo))
    if n_processes <= 1:
        worker = Worker(work)
        for number in todo:
            worker.run(stage, number)
            progress.done(plan.units[number].size)
    else:
        for number in _in_processes(work, stage, todo, n_processes):
            progress.done(plan.units[number].size)
    return [read_counts(work, stage, number) for number in units]


class _Progress:
    """A line every few seconds: amount, rate, remaining time."""

    def __init__(self, stage: str, total: int, todo: int, log: Log) -> None:
        self.stage, self.total, self.left, self.log = stage, total, todo, log
        self.began = self.last = time.monotonic()
        self.amount = 0

    def done(self, size: int) -> None:
        self.amount += size
        self.left -= size
        now = time.monotonic()
        if now - self.last < SECONDS:
            return
        self.last = now
        rate = self.amount / (now - self.began)
        minutes, seconds = divmod(round(self.left / rate) if rate else 0, 60)
        self.log(
            f"{self.stage}: {(self.total - self.left) / 1e6:,.0f} of {self.total / 1e6:,.0f} MB, "
            f"{rate / 1e6:,.1f} MB/s, eta {minutes}:{seconds:02d}"
        )


def _in_processes(work: Path, stage: str, todo: list[int], n: int) -> Iterator[int]:
    """The units as they are done."""
    # each process is one thread: the processes use the cores
    env = os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable, "-m", "train.prepare.workers", str(work.absolute()), str(os.getpid()),
    ]  # fmt: skip
    processes = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=env, text=True
        )
        for _ in range(n)
    ]
    waiting = iter(todo)
    try:
        with selectors.DefaultSelector() as selector:
            busy = 0
            for process in processes:
                assert process.stdout is not None
                selector.register(process.stdout, selectors.EVENT_READ, process)
                busy += _send(process, stage, next(waiting, None))
            while busy:
                for key, _ in selector.select():
                    process = key.data
                    line = process.stdout.readline()
                    answer = json.loads(line) if line else {}
                    if "unit" not in answer:
                        code = process.poll() if line else process.wait(60)
                        raise UserError(
                            answer.get("error")
                            or f"{stage}: a process ended with code {code}, perhaps for lack of "
                            "memory; use fewer --processes; the same command continues"
                        )
                    busy -= 1
                    yield answer["unit"]
                    busy += _send(process, stage, next(waiting, None))
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _send(process: "subprocess.Popen[str]", stage: str, number: int | None) -> int:
    """Start a unit on an idle process; returns how many were started."""
    if number is None:
        return 0
    assert process.stdin is not None
    process.stdin.write(json.dumps({"stage": stage, "unit": number}) + "\n")
    process.stdin.flush()
    return 1


def main(work: Path, parent: int) -> None:
    """Answer the requests on standard input. parent: the process that sends them."""
    if sys.platform == "linux":  # elsewhere a unit is finished first, for nothing
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends the others
    worker = Worker(work)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            found = worker.run(request["stage"], request["unit"])
            answer = {"unit": request["unit"], "found": found}
        except UserError as error:
            answer = {"error": str(error)}
        except OSError as error:
            answer = {"error": f"{error.filename or work}: {error.strerror or error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

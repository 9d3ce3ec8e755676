"""Runs the points as SLURM jobs, one each, and waits for them.

Every job waits for the one before it (`--dependency=afterany`): points are measured one at a time
and in the interleaved order, whatever else the cluster does. With `at_once` SLURM may run several
together; they are then submitted in that order.

The folders keep what was submitted, so the same command continues after an interruption: complete
points are not repeated, and jobs in the queue are waited for.
"""

import re
import sys
import time
from collections.abc import Sequence

from configs.errors import UserError
from launch import cluster, run_folder
from launch.options import slurm_site
from launch.submit import Run, read_run, submit_run
from scripts.scaling_sweep.points import Point, outcome

POLL_S = 10.0
"""Seconds between two questions to SLURM."""
_PATIENCE_S = 600.0
"""Time for which SLURM may leave questions unanswered."""
_FILES_S = 30.0
"""Time that a network file system may need to show what an ended job has written."""


def read_points(file: str, points: Sequence[Point], options: dict[str, object]) -> list[Run]:
    """The run of each point. options: those of every SLURM job, by their names with `_`. Raises
    UserError for a number of ranks that whole nodes do not have."""
    site_file = options["site"]
    site = slurm_site(site_file, options)  # type: ignore[arg-type]
    most = site.node.ranks_per_node
    given = [f"--{key}={value}" for key, value in options.items() if value is not None]
    runs = []
    for point in points:
        if point.ranks > most and point.ranks % most:
            raise UserError(
                f"--ranks {point.ranks}: a node has {most} ranks; a point has at most one node's, "
                "or those of several whole nodes"
            )
        nodes, each = max(1, point.ranks // most), min(point.ranks, most)
        size = [f"--nodes={nodes}", f"--ranks-per-node={each}"]
        runs.append(read_run([file, *size, *given, *point.overrides]))
    return runs


def run(points: Sequence[Point], runs: Sequence[Run], *, at_once: bool) -> int:
    """Submit all points that are not complete, and wait; returns 0 or 1, or 2 after an error in
    the settings. Raises UserError if SLURM refuses one."""
    jobs = _submit(points, runs, at_once)
    try:
        failed, code = _wait(points, jobs)
    except KeyboardInterrupt:
        print(
            "\nThe jobs stay in the queue: the same command waits for them again, and "
            f"`scancel {' '.join(jobs)}` removes them.",
            file=sys.stderr,
        )
        raise
    print(*outcome(points, failed), sep="\n", end="\n" * bool(failed), file=sys.stderr)
    return code


def _submit(points: Sequence[Point], runs: Sequence[Run], at_once: bool) -> dict[str, Point]:
    """The jobs by id, in order. A point that is complete has none; one that is in the queue keeps
    its job."""
    jobs: dict[str, Point] = {}
    queued = _queued(points)
    for point, one in zip(points, runs, strict=True):
        if point.is_complete:
            print(f"{point.name}: complete")
            continue
        if job := queued.get(point.name):
            print(f"{point.name}: job {job}, submitted before")
        else:
            try:
                (job,) = submit_run(one, after=None if at_once else next(reversed(jobs), None))
            except UserError as error:
                if jobs:
                    raise UserError(f"job {', '.join(jobs)} submitted; {error}") from None
                raise
            print(f"{point.name}: job {job}")
        jobs[job] = point
    sys.stdout.flush()
    return jobs


def _queued(points: Sequence[Point]) -> dict[str, str]:
    """The job of each point that has one in the queue, by the point's name."""
    last = {
        point.name: run_folder.read_submission(point.folder).jobs[-1]
        for point in points
        if (point.folder / run_folder.LAUNCH / run_folder.SUBMISSION).is_file()
    }
    active = cluster.queue([*last.values()])
    return {name: job for name, job in last.items() if job in active}


def _wait(points: Sequence[Point], left: dict[str, Point]) -> tuple[list[Point], int]:
    """Wait until all jobs have ended, and print what changes; returns the points that failed and
    the exit code. left: the jobs, which are removed as they end. After an error in the settings the
    other jobs are cancelled."""
    shown = dict[str, str]()
    failed: list[Point] = []
    silent_since: float | None = None
    while left:
        try:
            states = cluster.queue([*left])
            silent_since = None
        except UserError as error:
            now = time.monotonic()
            if silent_since is None:
                _say(f"{error}; asked again")
                silent_since = now
            if now - silent_since > _PATIENCE_S:
                raise
            time.sleep(POLL_S)
            continue
        for job in [job for job in left if job not in states]:
            point = left.pop(job)
            state, code = cluster.ended(job)
            if _completes(point, state):
                done = sum(one.is_complete for one in points)
                _say(f"{point.name}: complete ({done} of {len(points)})")
                continue
            failed.append(point)
            _say(f"error: {point.name}: {_failure(point, job, state)}")
            if code == 2:
                for other in reversed(left):
                    cluster.scancel(other)
                _say("the other jobs were cancelled: an error in the settings is theirs too")
                return failed, code
        for job, state in states.items():
            if "(Dependency)" not in state and shown.get(job) != state:
                _say(f"{left[job].name}: job {job} {state}")
                shown[job] = state
        if left:
            time.sleep(POLL_S)
    return failed, 1 if failed else 0


def _completes(point: Point, state: str) -> bool:
    """Whether the run of a job that has ended is complete, once its files are visible here."""
    deadline = time.monotonic() + (0.0 if state not in ("", "COMPLETED") else _FILES_S)
    while not point.is_complete:
        if time.monotonic() >= deadline:
            return False
        time.sleep(1.0)
    return True


def _failure(point: Point, job: str, state: str) -> str:
    """What is known about a job that ended before its last step."""
    logs = run_folder.node_logs(point.folder)
    words = f"job {job} ended{f' ({state})' if state else ''} after step {point.steps} of "
    words += f"{point.config.train.steps}"
    if not logs:
        return f"{words}; it has written no log"
    lines = [(log, line) for log in logs for line in run_folder.tail(log, 2000) if line.strip()]
    errors = [(log, line) for log, line in lines if re.match(r"\S*(error|Error)\b", line)]
    log, line = (errors or lines or [(logs[-1], "")])[-1]
    return f"{words}; {log}: {line}"


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {UserError(line)}", flush=True)

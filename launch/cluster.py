"""Calls the commands of SLURM; an error of theirs becomes one line with their words."""

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from configs.errors import UserError

_TIMEOUT_S = 60
_NEVER = re.compile(
    r"\((PartitionTimeLimit|PartitionNodeLimit|PartitionConfig|BadConstraints"
    r"|(Assoc|QOS)MaxWallDurationPerJobLimit)\)"
)
"""Reasons of pending jobs that do not pass with time."""


def sbatch(script: Path, *, after: str | None = None) -> str:
    """Submit the script; returns the job's id.

    Variables SBATCH_* of the user's shell would replace what the script states, so they are not
    passed. SLURM accepts a job that can never start and leaves it in the queue; `--test-only` finds
    this, except for more time than a partition allows, which the job's reason shows.

    after: job that has to end first, with any result. Raises UserError.
    """
    call(["sbatch", "--test-only", str(script)])
    words = ["sbatch", "--parsable"]
    words += [f"--dependency=afterany:{after}"] if after else []
    said = call([*words, str(script)]).strip().splitlines()
    found = re.fullmatch(r"(\d+)(;\S*)?", said[-1] if said else "")
    if not found:
        raise UserError(f"sbatch: printed {' '.join(said)!r}, not the number of a job")
    job = found[1]
    if never := _NEVER.search(queue([job]).get(job, "")):
        scancel(job)
        raise UserError(
            f"SLURM would never start this job, it was cancelled: {never[1]} (time, nodes or "
            "constraint against the limits of the partition: scontrol show partition)"
        )
    return job


def scancel(job: str) -> None:
    """Cancel a job; no error if it has ended."""
    call(["scancel", "--quiet", job])


def queue(jobs: Sequence[str]) -> dict[str, str]:
    """State and reason of those of the jobs that have not ended, by id."""
    if not jobs:
        return {}
    me = ["squeue", "--noheader", "--array", "--me", "--format=%A|%F|%T|%r"]
    found = {}
    for line in call(me).splitlines():
        job, array, state, reason = line.split("|", 3)
        for one in {job, array} & {*jobs}:
            found[one] = state + (f" ({reason})" if reason not in ("None", "") else "")
    return found


def ended(job: str) -> tuple[str, int]:
    """State and exit code of a job that has left the queue, as ("FAILED, exit code 2", 2). SLURM
    discards them after minutes (MinJobAge); then "" and 0."""
    try:
        said = call(["scontrol", "show", "job", "--oneliner", job])
    except UserError:
        return "", 0
    state, code = (re.search(rf"\b{key}=(\w+)", said) for key in ("JobState", "ExitCode"))
    if not state:
        return "", 0
    number = int(code[1]) if code and code[1].isdigit() else 0
    return state[1] + (f", exit code {number}" if number else ""), number


def call(words: Sequence[str]) -> str:
    """The output of a command. Raises UserError if it is missing, slow or fails."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SBATCH_")}
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=_TIMEOUT_S, env=clean, check=False
        )
    except FileNotFoundError:
        raise UserError(
            f"{words[0]}: not found; run this on a login node of a SLURM cluster, or use "
            "--dry-run, or python -m launch.local"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{words[0]}: no answer within {_TIMEOUT_S} s; is slurmctld up?") from None
    if done.returncode:
        errors = " ".join((done.stderr or done.stdout).split())
        raise UserError(f"{words[0]} refused: {errors or f'exit code {done.returncode}'}")
    return done.stdout

"""Runs the points one after the other on this machine."""

import os
import subprocess
import sys
from collections.abc import Sequence

from launch.supervisor.policy import INTERRUPTED, USER_ERROR
from scripts.scaling_sweep.points import Point, outcome

_STOPS = (USER_ERROR, os.EX_TEMPFAIL, INTERRUPTED)
"""Codes after which no other point is started: an error in the settings, a signal."""


def run(file: str, points: Sequence[Point]) -> int:
    """Train all points that are not complete; returns the first exit code that is not 0."""
    failed, first = [], 0
    for number, point in enumerate(points, start=1):
        if point.is_complete:
            print(f"--- {point.folder} ({number} of {len(points)}) is complete", flush=True)
            continue
        print(f"--- {point.folder} ({number} of {len(points)})", flush=True)
        command = [sys.executable, "-m", "launch.local", file, f"--nproc={point.ranks}"]
        code = subprocess.run([*command, *point.overrides]).returncode
        if code:
            first = first or code
            failed.append(point)
        if code in _STOPS:
            return code
    print(*outcome(points, failed), sep="\n", end="\n" * bool(failed), file=sys.stderr)
    return first

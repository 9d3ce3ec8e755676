"""NVIDIA's compute-sanitizer on the kernels that wait at barriers, where it is installed.

A missing wait at a barrier usually yields the right result, until the timing changes.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from scripts.gpu_suite.harness import Check, Place
from scripts.gpu_suite.runner.section import Unsupported

TOOLS = ("memcheck", "synccheck", "racecheck")
FOLDERS = ("/usr/local/cuda/bin", "/opt/cuda/bin", "/usr/local/cuda/compute-sanitizer")
"""Where it is, if it is not on the path."""


def check(place: Place) -> Iterator[Check]:
    """The number of errors that each tool reports about the smallest checks of the Gluon
    kernels."""
    program = installed()
    if program is None:
        raise Unsupported("compute-sanitizer is not installed")
    for tool in TOOLS:
        yield Check(f"compute-sanitizer --tool {tool}: errors", _errors(program, tool, place), 0)


def installed() -> str | None:
    """Its path, if it is on this machine."""
    found = shutil.which("compute-sanitizer")
    places = [Path(folder) / "compute-sanitizer" for folder in FOLDERS]
    return found or next((str(path) for path in places if path.is_file()), None)


def _errors(program: str, tool: str, place: Place) -> float:
    options = ["--dry-run"] if place.dry_run else []
    done = subprocess.run(
        [program, "--tool", tool, sys.executable, "-m", "scripts.gpu_suite.gluon", "--smallest",
         *options],
        cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True,
    )  # fmt: skip
    lines = re.findall(r"ERROR SUMMARY: (\d+) error", done.stdout + done.stderr)
    if not lines:
        last = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
        raise RuntimeError(f"compute-sanitizer --tool {tool}: {last[-1]}")
    return float(lines[-1])

"""Records the environment of a run with its results."""

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from configs.parallel_dims import ParallelDims
from parallel.ranks import Ranks
from train.atomic_files import replace_text, set_aside

_PACKAGES = ("torch", "triton", "torchtitan", "numpy", "tokenizers", "safetensors", "datasets")


def describe(ranks: Ranks, parallel_dims: ParallelDims, compute: torch.dtype) -> dict[str, Any]:
    """Versions, commit, host, device and mesh of this attempt."""
    device = torch.cuda.get_device_name() if ranks.device.type == "cuda" else cpu_name()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
        "host": platform.node(),
        "platform": platform.platform(),
        "device": device,
        "cores": os.cpu_count(),
        "threads_per_rank": torch.get_num_threads(),
        "compute_dtype": str(compute).removeprefix("torch."),
        "ranks": ranks.world,
        "mesh": {axis: size for axis, size, _ in parallel_dims.table()},
    }


def record(folder: Path, attempt: dict[str, Any]) -> list[str]:
    """Append this attempt to `environment.json` of the run.

    Returns messages for the user: a file that cannot be read loses earlier records, but does not
    stop the run.
    """
    path = folder / "environment.json"
    attempts, lines = _attempts(path), []
    if attempts is None:
        attempts, lines = [], [set_aside(path)]
    replace_text(path, json.dumps([*attempts, attempt], indent=2) + "\n")
    return lines


def _attempts(path: Path) -> list[dict[str, Any]] | None:
    """The attempts recorded so far; None if the file does not contain them."""
    if not os.path.lexists(path):
        return []
    if not path.is_file():
        return None
    try:
        attempts = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    is_list = isinstance(attempts, list) and all(isinstance(one, dict) for one in attempts)
    return attempts if is_list else None


def cpu_name() -> str:
    """The processor's name from the kernel; on Linux `platform.processor` is mostly empty."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names[0] if names else platform.processor()) or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout, with `+` if files differ from it; None outside git."""
    root = Path(__file__).resolve().parents[2]
    try:
        run = lambda *a: subprocess.run(  # noqa: E731
            ["git", "-C", str(root), *a], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        return run("rev-parse", "HEAD") + ("+" if run("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None

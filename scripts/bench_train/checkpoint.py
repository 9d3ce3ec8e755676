"""`python -m scripts.bench_train.checkpoint FILE.toml [--nproc N] [--every K] [--saves M]
[--rounds R]`: what checkpoints cost the steps of a training.

Trains the experiment in temporary folders, R times each and in turn: with checkpoints every K steps
that are written while training continues, with checkpoints that the steps wait for, and without.
Prints per kind: the median step; how long the loop was blocked by a save, in steps; and the 50th
and 99th percentile of the steps during a save and the five after it, relative to those of the same
steps of the runs without checkpoints and to the other steps of the same run; and, for the first,
second, ... step after a save, the median over all saves of its time relative to the median of the
others between the same two saves. The last figure depends least on what else the machine does.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.report.metrics import METRICS, read_lines

_AFTER = 5
"""Steps after a save that count as its neighborhood."""
_WARMUP = 8
"""First steps, which are slower."""
KINDS = {
    "background": ["--checkpoint.async_save=true"],
    "waiting": ["--checkpoint.async_save=false"],
    "none": ["--checkpoint.every=0"],
}


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench_train.checkpoint", description=__doc__
    )
    parser.add_argument("file")
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--every", type=int, default=25, help="steps between checkpoints")
    parser.add_argument("--saves", type=int, default=4, help="checkpoints per run")
    parser.add_argument("--rounds", type=int, default=2)
    options, overrides = parser.parse_known_args(arguments)
    found: dict[str, list[list[dict[str, Any]]]] = {kind: [] for kind in KINDS}
    steps = _WARMUP + options.every * options.saves + options.every // 2
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-") as place:
        for i in range(options.rounds):
            for kind, more in KINDS.items():
                folder = Path(place) / f"{kind}-{i}"
                words = [options.file, *overrides, f"--run.dir={folder}", f"--train.steps={steps}"]
                words += [f"--schedule.steps={steps}", "--validation.every=0"]
                _train([*words, f"--checkpoint.every={options.every}", *more], options.nproc)
                found[kind].append(read_lines(folder / METRICS))
    saves = [options.every * (i + 1) for i in range(options.saves)]
    figures = {kind: describe(runs, found["none"], saves) for kind, runs in found.items()}
    print(json.dumps({"steps": steps, "saves": saves, **figures}, indent=1))
    return 0


def describe(
    runs: Sequence[list[dict[str, Any]]], without: Sequence[list[dict[str, Any]]], saves: list[int]
) -> dict[str, Any]:
    """The figures of one kind of run. without: runs without checkpoints, of the same length."""
    near, far, same, blocked, written = [], [], [], [], []
    for run, other in zip(runs, without, strict=True):
        close = neighborhood(run, saves)
        times = {r["step"]: r["step_s"] for r in run}
        others = {r["step"]: r["step_s"] for r in other}
        near += [times[step] for step in close]
        same += [others[step] for step in close]
        far += [s for step, s in times.items() if step > _WARMUP and step not in close]
        blocked += [r["checkpoint/blocked_s"] for r in run if "checkpoint/blocked_s" in r]
        written += [r["checkpoint/write_s"] for r in run if "checkpoint/write_s" in r]
    step = statistics.median(far)
    return {
        "median step (s)": round(step, 4),
        "blocked per save (steps)": round(statistics.median(blocked) / step, 3) if blocked else 0.0,
        "written in the background (s)": round(statistics.median(written), 3) if written else 0.0,
        "steps near saves": len(near),
        "p50 near saves / other steps": _ratio(near, far, 50),
        "p99 near saves / other steps": _ratio(near, far, 99),
        "p50 near saves / same steps without": _ratio(near, same, 50),
        "p99 near saves / same steps without": _ratio(near, same, 99),
        "steps after a save / others (medians)": by_position(runs, saves),
    }


def by_position(runs: Sequence[list[dict[str, Any]]], saves: list[int]) -> list[float]:
    """For the first, second, ... step after a save, the median of its time relative to the later
    steps up to the next save."""
    ratios: list[list[float]] = [[] for _ in range(_AFTER + 1)]
    for run in runs:
        times = {r["step"]: r["step_s"] for r in run}
        for i, save in enumerate(saves):
            end = saves[i + 1] if i + 1 < len(saves) else max(times)
            others = [times[step] for step in range(save + _AFTER + 2, end + 1) if step in times]
            if others:
                usual = statistics.median(others)
                for k, found in enumerate(ratios):
                    found.append(times[save + 1 + k] / usual)
    return [round(statistics.median(found), 3) for found in ratios if found]


def neighborhood(run: list[dict[str, Any]], saves: list[int]) -> set[int]:
    """The steps during a save and the five after it. A step's record has the result of the save
    that ended before it began."""
    ends = [r["step"] for r in run if "checkpoint/write_s" in r]
    close: set[int] = set()
    for save in saves:
        end = min((step for step in ends if step > save), default=save + 1)
        close |= {step for step in range(save + 1, end + _AFTER + 1) if step <= run[-1]["step"]}
    return close


def _ratio(one: list[float], other: list[float], percent: int) -> float:
    def percentile(values: list[float]) -> float:
        return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]

    return round(percentile(one) / percentile(other), 3)


def _train(words: list[str], ranks: int) -> None:
    command = [sys.executable, "-m", "train", *words]
    if ranks > 1:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        address = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
        command = [sys.executable, *launcher, *address, "-m", "train", *words]
    env = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`python -m scripts.bench_growth`: how a training step grows with one size at a time.

Starts from the demo's experiment and changes one size, all else equal:

- experts: their number, at the same number of active parameters per token,
- top_k: experts per token,
- sequence: tokens per sequence, with 8,192 tokens in every step, documents of 4,900 on average,
- short_documents: the same with documents of about 700 tokens, and a sequence of 32,768,
- layers,
- threads: of one rank,
- ranks: of one thread, with the same batch in total.

Each point is a run of a few steps; the runs of one axis alternate over the rounds, so that other
load on the machine affects all of them. Prints a table per axis, with the exponent of the time per
token between neighboring points (1: proportional to the size) and the model's FLOPs per token
relative to the first point (for sequences of one document each), and draws all axes in one
picture. CPU only.
"""

import math
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from configs.command_line import CommandParser
from scripts.bench_growth.axes import AXES, Point, write_short_documents
from scripts.bench_growth.pictures import draw
from scripts.bench_train.peers import Result, run_trainer
from train.report.environment import cpu_name

WARMUP = 3
"""Steps of every run that are not counted."""


@dataclass(frozen=True)
class Measured:
    """Medians of a point's runs."""

    point: Point
    tokens_per_s: float
    memory_gib: float
    """Of rank 0."""
    loss: float
    """Of the first step."""


def main() -> int:
    """Print the tables and draw the picture."""
    parser = CommandParser(prog="python -m scripts.bench_growth", description=__doc__)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--rounds", type=int, default=3, help="runs of each point (default 3)")
    parser.add_argument("--steps", type=int, default=8, help="steps per run (default 8)")
    parser.add_argument("--picture", type=Path, help="a .png to draw")
    options = parser.parse_args()
    if options.steps <= WARMUP or options.rounds < 1:
        parser.error(f"--steps must be more than the {WARMUP} of warm-up, --rounds at least 1")
    print(f"{time.strftime('%Y-%m-%d')}, {cpu_name()}, torch {torch.__version__}", flush=True)
    found = {}
    for name in options.axes:
        try:
            found[name] = _measure(name, options.rounds, options.steps)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"{name}: {error}\n{error.stderr}") from None
        print("\n".join(table(name, found[name])), flush=True)
    if options.picture:
        curves = {
            name: [(m.point.size, 1e3 / m.tokens_per_s, m.memory_gib) for m in points]
            for name, points in found.items()
        }
        print(f"drew {draw(curves, options.picture)}")
    return 0


def _measure(name: str, rounds: int, steps: int) -> list[Measured]:
    if name == "short_documents":
        write_short_documents()
    runs: dict[Point, list[Result]] = {point: [] for point in AXES[name]}
    for round_ in range(1, rounds + 1):
        for point, results in runs.items():
            result = run_trainer(
                point.experiment, point.arguments, steps, point.ranks, point.threads, WARMUP
            )
            results.append(result)
            print(
                f"{name} {point.size}, {round_} of {rounds}: {result.tokens_per_s:,.0f} tokens/s, "
                f"{result.memory_gib:.2f} GiB",
                flush=True,
            )
    return [
        Measured(
            point,
            statistics.median(result.tokens_per_s for result in results),
            statistics.median(result.memory_gib for result in results),
            results[0].losses[0],
        )
        for point, results in runs.items()
    ]


def table(name: str, points: list[Measured]) -> list[str]:
    """The lines of an axis, in Markdown."""
    lines = [
        f"| {name} | tokens/s | relative to the first | exponent | FLOPs | GiB | first loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for before, one in zip([None, *points], points, strict=False):
        slope = ""
        if before is not None:
            slower = before.tokens_per_s / one.tokens_per_s
            slope = f"{math.log(slower) / math.log(one.point.size / before.point.size):.2f}"
        flops = one.point.flops_per_token() / points[0].point.flops_per_token()
        lines.append(
            f"| {one.point.size:,} | {one.tokens_per_s:,.0f} | "
            f"{one.tokens_per_s / points[0].tokens_per_s:.2f} | {slope} | {flops:.2f} | "
            f"{one.memory_gib:.2f} | {one.loss:.3f} |"
        )
    return lines


if __name__ == "__main__":
    raise SystemExit(main())

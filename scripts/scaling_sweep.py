"""`python -m scripts.scaling_sweep FILE.toml OUT --ranks 1,2,4 [--weak] [--repeats 3]`.

Trains the experiment at each number of ranks, with natural and with forced routing, on this
machine. Repeats are interleaved (all points, then all again), so that a change of the machine's
load affects every point. Strong scaling keeps `train.global_batch`; weak scaling multiplies it by
the ranks. The last step of each run is profiled. `python -m scripts.scaling_report OUT/*` makes the
report.
"""

import subprocess
import sys
from pathlib import Path

from configs.command_line import CommandParser
from configs.errors import UserError
from configs.loader import load
from configs.parallel_dims import resolve
from scripts.scaling_report.runs import LEAST_STEPS, WARMUP

_STEPS = WARMUP + LEAST_STEPS + 1
_OWN = ("--run.dir", "--train.profile_steps", "--model.moe.force_balance")


def main(arguments: list[str]) -> int:
    """Train all points; returns the exit code."""
    parser = CommandParser(
        prog="python -m scripts.scaling_sweep", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("file", help="experiment (TOML)")
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--ranks", default="1,2,4", help="numbers of ranks (default 1,2,4)")
    parser.add_argument("--weak", action="store_true", help="weak instead of strong scaling")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of each point (default 3)")
    options, overrides = parser.parse_known_args(arguments)
    try:
        ranks = [int(word) for word in options.ranks.split(",") if word.isdigit()]
        if not ranks or ",".join(map(str, ranks)) != options.ranks or min(ranks) < 1:
            raise UserError(f"--ranks {options.ranks}: must be numbers such as 1,2,4")
        if len({*ranks}) < len(ranks):
            raise UserError(f"--ranks {options.ranks}: a number is given twice")
        if not 1 <= options.repeats <= 100:
            raise UserError(f"--repeats {options.repeats}: must lie between 1 and 100")
        points = {n: _overrides(options.file, overrides, n, options.weak) for n in ranks}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for repeat in range(options.repeats):
        for n, words in points.items():
            for routing in ("natural", "forced"):
                folder = options.out / f"{routing}-{n}-{repeat}"
                print(f"--- {folder}", flush=True)
                forced = f"--model.moe.force_balance={'true' if routing == 'forced' else 'false'}"
                command = [sys.executable, "-m", "launch.local", options.file, f"--nproc={n}"]
                done = subprocess.run([*command, *words, forced, f"--run.dir={folder}"])
                if done.returncode:
                    return done.returncode
    return 0


def _overrides(file: str, overrides: list[str], ranks: int, weak: bool) -> list[str]:
    """The settings of a point. Raises UserError if the mesh does not fit."""
    config = load(file, overrides)
    if own := [word for word in overrides if word.split("=")[0] in _OWN]:
        raise UserError(f"{own[0]}: every point has its own; leave it out")
    if config.train.steps < _STEPS:
        raise UserError(
            f"train.steps = {config.train.steps}: a point needs at least {_STEPS}: {WARMUP} of "
            f"warmup, {LEAST_STEPS} that are measured, and the last, which is profiled"
        )
    batch = config.train.global_batch * (ranks if weak else 1)
    words = [
        *overrides, f"--train.global_batch={batch}", f"--train.profile_steps=[{config.train.steps}]"
    ]  # fmt: skip
    resolve(load(file, words), ranks)
    return words


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

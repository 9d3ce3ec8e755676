"""`python -m scripts.scaling_sweep FILE.toml --ranks 1,2,4 [--weak] [--repeats 3] [--slurm]`.

Trains the experiment at each number of ranks, with natural and with forced routing, and then makes
the report (`python -m scripts.scaling_report`). Repeats are interleaved (all points, then all
again), so that a change of the machine's load affects every point. Strong scaling keeps
`train.global_batch`; weak scaling multiplies it by the ranks. The last step of each run is
profiled. Points run on this machine one after the other, or with --slurm as one job each.
"""

import shlex
import sys
from pathlib import Path

from configs.command_line import CommandParser
from configs.errors import UserError
from launch.options import counts, parsed, slurm_options
from launch.supervisor.policy import INTERRUPTED
from scripts.scaling_sweep import local, slurm
from scripts.scaling_sweep.points import Point, points_of


def main(arguments: list[str]) -> int:
    """Train all points and make the report; returns the exit code."""
    parser = CommandParser(
        prog="python -m scripts.scaling_sweep", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("file", help="experiment (TOML)")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: run.dir + -scaling)")
    parser.add_argument("--ranks", default="1,2,4", help="numbers of ranks (default 1,2,4)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--strong", action="store_true", help="the same global batch (default)")
    kind.add_argument("--weak", action="store_true", help="the global batch times the ranks")
    parser.add_argument("--repeats", default="3", help="repeats of each point (default 3)")
    parser.add_argument("--note", default="", help="a sentence about the machine, for the report")
    parser.add_argument("--slurm", action="store_true", help="one SLURM job per point")
    parser.add_argument(
        "--at-once", action="store_true", help="with --slurm: several jobs at the same time"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="with --slurm: print the scripts, submit nothing"
    )
    names = slurm_options(parser)
    try:
        options, overrides = parsed(parser, arguments)
        given = {name: getattr(options, name) for name in names}
        only = [f"--{name}" for name, value in given.items() if value is not None]
        only += ["--at-once"] * options.at_once + ["--dry-run"] * options.dry_run
        if only and not options.slurm:
            raise UserError(f"{only[0]}: needs --slurm")
        ranks = _ranks(options.ranks)
        repeats = counts(options.repeats, 1, "--repeats")[0]
        if repeats > 100:
            raise UserError(f"--repeats {repeats}: must lie between 1 and 100")
        points = points_of(
            options.file, overrides, ranks, repeats, options.out, is_weak=options.weak
        )
        if options.slurm:
            runs = slurm.read_points(options.file, points, given)
            if options.dry_run:
                print(*(run.scripts()[-1] for run in runs), sep="\n", end="")
                return 0
            code = slurm.run(points, runs, at_once=options.at_once)
        else:
            code = local.run(options.file, points)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {UserError(f'{where}{error.strerror or error}')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    return code or _report(points, ranks, options.note)


def _ranks(text: str) -> list[int]:
    """The numbers of `--ranks`. Raises UserError."""
    ranks = counts(text, 100, "--ranks")
    if len({*ranks}) < len(ranks):
        raise UserError(f"--ranks {text}: a number is given twice")
    return ranks


def _report(points: list[Point], ranks: list[int], note: str) -> int:
    """Make the report next to the folder of the runs; returns its exit code."""
    base = points[0].folder.parent
    if base.name in ("", ".."):  # as `.`: no name to add to
        base = base.resolve()
    words = [*(str(point.folder) for point in points), f"--out={base}-report"]
    words += [f"--note={note}"] * bool(note)
    if len(ranks) < 2:
        print(f"one number of ranks: no report; runs in {base}")
        return 0
    try:
        from scripts.scaling_report.__main__ import main as report
    except ModuleNotFoundError as error:  # a login node
        command = shlex.join(["python", "-m", "scripts.scaling_report", *words])
        print(f"{error.name} is not installed here; where it is, run: {command}", file=sys.stderr)
        return 2
    return report(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

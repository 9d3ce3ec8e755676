"""`python -m launch.local FILE.toml --nproc N [--section.key=value ...]`: train on this machine.

    python -m launch.local sweep FILE.toml --nproc 1,2 --set optimizer.lr=1e-3,3e-3

Starts `python -m train` on every rank and supervises it: after a failure all ranks start again from
the newest checkpoint (`launch/supervisor`). Passes signals on and returns 75 if they stopped the
training before its last step: then the same command continues. `sweep` trains every combination of
values in run.dir/NAME, one after the other, and prints a table; a run that is complete is not
repeated.
"""

import argparse
import os
import re
import sys

from configs.command_line import CommandParser
from configs.errors import UserError
from configs.loader import load
from configs.parallel_dims import resolve
from configs.paths import local_path
from launch.supervisor.policy import INTERRUPTED, Limits
from launch.supervisor.supervise import Supervisor
from launch.sweep import own_checkpoints, results, variants


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    if arguments and arguments[0] == "sweep":
        return sweep(arguments[1:])
    parser = CommandParser(prog="python -m launch.local", description=__doc__, allow_abbrev=False)
    parser.add_argument("file", help="experiment (TOML)")
    parser.add_argument("--nproc", type=int, default=1, help="ranks (default 1)")
    parser.add_argument(
        "--module", default="train", choices=["train", "scripts.inject_faults.rank"],
        help="what the ranks run; the second also obeys `python -m scripts.inject_faults`",
    )  # fmt: skip
    _add_limits(parser)
    options, overrides = parser.parse_known_args(arguments)
    try:
        config = load(options.file, overrides)
        resolve(config, options.nproc)
        folder = local_path(config.run.dir)
        words = [options.file, *overrides]
        health, limits = config.health, _limits(options)
        run = Supervisor(words, options.nproc, folder, limits, health, options.module)
        return run.run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _add_limits(parser: CommandParser) -> None:
    """Add the options of `Limits`."""
    default = Limits()
    parser.add_argument(
        "--restarts-per-hour", type=int, default=default.restarts_per_hour,
        help="restarts within any hour, 0 for none (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--attempts-without-progress", type=int, default=default.attempts_without_progress,
        help="failed attempts in a row without a further step or checkpoint (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--backoff", type=float, default=default.backoff_s, metavar="SECONDS",
        help="pause between attempts without progress, doubled each time (default %(default)s)",
    )  # fmt: skip


def _limits(options: argparse.Namespace) -> Limits:
    """The limits of the options. Raises UserError."""
    for name, low, high in (
        ("restarts_per_hour", 0, 10**6), ("attempts_without_progress", 1, 10**6),
        ("backoff", 0, 3600),
    ):  # fmt: skip
        value = getattr(options, name)
        if not low <= value <= high:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {value}: must be from {low} to {high}")
    return Limits(options.restarts_per_hour, options.attempts_without_progress, options.backoff)


def sweep(arguments: list[str]) -> int:
    """Train all variants of an experiment; returns 0, or the first code that is not. A variant that
    fails does not keep the others from being trained; a signal does."""
    parser = CommandParser(
        prog="python -m launch.local sweep", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("file", help="experiment (TOML)")
    parser.add_argument("--nproc", default="1", help="ranks, or several numbers: 1,2,4")
    parser.add_argument("--set", action="append", default=[], help="section.key=value,value,...")
    _add_limits(parser)
    options, overrides = parser.parse_known_args(arguments)
    try:
        limits = _limits(options)
        if not re.fullmatch(r"[1-9]\d{0,2}(,[1-9]\d{0,2})*", options.nproc):
            raise UserError(f"--nproc {options.nproc}: must be N or N,N,...")
        ranks = [int(word) for word in options.nproc.split(",")]
        found = variants(options.set, ranks, overrides)
        configs = [load(options.file, [*overrides, *one.overrides]) for one in found]
        for config, one in zip(configs, found, strict=True):
            resolve(config, one.nodes)
        base = local_path(configs[0].run.dir).absolute()
        failed: dict[str, int] = {}
        for config, one in zip(configs, found, strict=True):
            print(f"--- {one.name}", flush=True)
            words = [*overrides, *one.overrides, f"--run.dir={base / one.name}"]
            words += own_checkpoints(configs[0], one.name)
            folder = base / one.name
            run = Supervisor([options.file, *words], one.nodes, folder, limits, config.health)
            code = run.run()
            if code in (os.EX_TEMPFAIL, INTERRUPTED):
                return code
            if code:
                failed[one.name] = code
        print(results(base), end="")
        if failed:
            names = ", ".join(f"{name} (exit code {code})" for name, code in failed.items())
            print(f"error: {len(failed)} of {len(found)} runs failed: {names}", file=sys.stderr)
        return next(iter(failed.values()), 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

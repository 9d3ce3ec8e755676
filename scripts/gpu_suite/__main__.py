"""Command line of the suite.

This process never uses the GPU: every section does in a process of its own (`runner.process`).
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from configs.command_line import CommandParser
from scripts.gpu_suite.harness import Place
from scripts.gpu_suite.runner.facts import facts
from scripts.gpu_suite.runner.goals import GOALS
from scripts.gpu_suite.runner.report import Report
from scripts.gpu_suite.runner.section import Section, nothing
from scripts.gpu_suite.runner.suite import Suite, chosen
from scripts.gpu_suite.runner.summary import Goal, is_sound, summary
from scripts.gpu_suite.sections import SECTIONS


def main() -> None:
    """Run the chosen sections; exit 1 if a kernel is wrong, a section broke off, or there is no
    device."""
    names = [section.name for section in SECTIONS]
    parser = CommandParser(
        prog="python -m scripts.gpu_suite",
        description="Every kernel on a CUDA device: correctness first, then time.",
    )
    parser.add_argument("--sections", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=20, help="timed runs of each (default 20)")
    parser.add_argument("--check-only", action="store_true", help="correctness, no times")
    parser.add_argument(
        "--minutes", type=float, help="end after this time and name what did not fit"
    )
    parser.add_argument("--json", type=Path, help="all results, complete after each of them")
    parser.add_argument(
        "--dry-run", action="store_true",
        help="tiny shapes on the CPU, invented times: does the suite itself work?",
    )  # fmt: skip
    options = parser.parse_args()
    if options.minutes is not None and not options.minutes > 0:
        parser.error("--minutes must be positive")
    sections = chosen(SECTIONS, options.sections)
    if options.check_only:
        sections = [_without_times(section) for section in sections]
    device = torch.device("cpu" if options.dry_run else "cuda:0")
    place = Place(device, options.dry_run, options.rounds)
    sys.exit(run(sections, place, options.json, options.minutes))


def run(
    sections: list[Section], place: Place, path: Path | None, minutes: float | None,
    goals: list[Goal] = GOALS,
) -> str | int:  # fmt: skip
    """Run sections and print the summary, also after SIGTERM; returns what to exit with."""
    report = Report(path, [section.name for section in sections])
    suite = Suite(sections, place, report, minutes, facts(place))
    with _ended_by_signals(suite):
        problem = suite.run()
    if problem:
        return problem
    print("", *summary(report, goals, place.dry_run), sep="\n", flush=True)
    return 0 if is_sound(report) and not suite.interrupted else 1


@contextmanager
def _ended_by_signals(suite: Suite) -> Iterator[None]:
    """Let signals end the section that runs, and the suite after its summary."""

    def end(number: int, _: object) -> None:
        suite.interrupted = f"interrupted by {signal.Signals(number).name}"

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _without_times(section: Section) -> Section:
    return replace(section, measure=nothing, shares=0)


if __name__ == "__main__":
    main()

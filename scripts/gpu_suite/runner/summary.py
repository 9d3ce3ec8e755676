"""One screen: goals with their figures, what failed, what was not measured."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from scripts.gpu_suite.runner.report import Report

_WIDTH = 100
_MOST_LINES = 8
"""Of failures and of what is missing, each."""


@dataclass(frozen=True)
class Goal:
    """A figure of the report, and what it should be."""

    text: str
    section: str
    figure: Callable[[list[dict[str, Any]]], float | None]
    """From the timings of the section; None if what it needs was not measured."""
    limit: float
    unit: str = ""
    at_most: bool = False
    """Whether the limit is the largest value and not the least."""

    def line(self, report: Report, fake: bool = False) -> str:
        """Goal, figure and result."""
        found = self.figure(report.timings(self.section))
        sign = "<=" if self.at_most else ">="
        if found is None:
            figure, result = "-", "not measured"
        else:
            is_met = found <= self.limit if self.at_most else found >= self.limit
            figure, result = _number(found), "met" if is_met else "MISSED"
            if fake:
                result = "invented"
            if report.failed(self.section):
                result += ", but checks failed"
        goal = f"{sign} {_number(self.limit)}{self.unit}"
        return f"{self.text:<58} {goal:>15} {figure:>9}  {result}"


def summary(report: Report, goals: list[Goal], fake: bool) -> list[str]:
    """The lines to print."""
    value = report.value
    lines = [f"== {value.get('device', 'unknown device')}, commit {value.get('commit', 'unknown')}"]
    if fake:
        lines.append("Times are invented: this was a dry run.")
    lines += [goal.line(report, fake) for goal in goals if goal.section in value["sections"]]
    lines += _few("not measured", [*_missing(report)]) + _few("FAILED", [*_failures(report)])
    n_checks = sum(len(section["checks"]) for section in value["sections"].values())
    n_failed = sum(len(report.failed(name)) for name in value["sections"])
    lines.append(f"{n_checks - n_failed} of {n_checks} checks passed")
    return [line[: 2 * _WIDTH] for line in lines]


def is_sound(report: Report) -> bool:
    """Whether no check failed and no section broke off on its own."""
    return not any(_failures(report))


def _failures(report: Report) -> Iterator[str]:
    for name, section in report.value["sections"].items():
        for check in report.failed(name):
            yield f"{name}: {check['case']}: {check['figure']}, limit {check['limit']:.3g}"
        for part in ("check", "measure"):
            if section[part]["state"] == "failed":
                yield f"{name}, {part}: {section[part]['reason']}"


def _missing(report: Report) -> Iterator[str]:
    for name, section in report.value["sections"].items():
        for part, results in (("check", "checks"), ("measure", "timings")):
            state, n = section[part]["state"], len(section[results])
            if state in ("not started", "stopped", "unsupported", "under way"):
                reason = section[part]["reason"] or "no time left"
                yield f"{name}, {part}: {state} after {n} results: {reason}"


def _few(title: str, found: list[str]) -> list[str]:
    more = [f"{title}: {len(found) - _MOST_LINES} more, in the JSON file"]
    return [f"{title}: {text}" for text in found[:_MOST_LINES]] + more * (len(found) > _MOST_LINES)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"

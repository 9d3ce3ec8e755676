"""The order of the work: compile and check everything at once, then measure, most valuable first.

| part | processes | ends |
|---|---|---|
| facts about the device | one | |
| checks, and one run of what is measured, to compile it | one per core | limits of the sections |
| times, in the order of `sections` | one at a time | limits of the sections |
| checks that need the machine for themselves | one at a time | limits of the sections |

Compilation ends after a third of the time.

Sections with failed checks are measured last, and their figures are marked: they are those of a
wrong kernel, or of a limit that is too narrow. What no longer fits into the time is named.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

from scripts.gpu_suite.harness import Place
from scripts.gpu_suite.runner.process import Process, Send, run_all
from scripts.gpu_suite.runner.report import Report
from scripts.gpu_suite.runner.section import Section, checking, compiling, measuring

OVER = "the time of the suite is over"
_COMPILE = "compile "
_HEADING = "| case | implementation | ms | rate | ours is faster by |\n|---|---|---|---|---|"
_SHARE_TO_COMPILE = 1 / 3
_LEAST_S = 2.0
"""With less time left no further process is started."""


class Suite:
    """One run of some sections."""

    def __init__(
        self, sections: list[Section], place: Place, report: Report, minutes: float | None,
        facts: Callable[[Send], None],
    ) -> None:  # fmt: skip
        """minutes: of the whole run; None: no limit. facts: sends facts about the device, and may
        raise if there is none."""
        self.sections, self.place, self.report, self.facts = sections, place, report, facts
        self.begin = time.monotonic()
        self.end = None if minutes is None else self.begin + 60 * minutes
        self.interrupted = ""
        """Set to a reason to end all; empty until then."""
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        self.compiled: dict[str, Any] = {
            "kernels": 0, "seconds": 0.0, "wall_s": 0.0, "incomplete": [],
        }  # fmt: skip

    def run(self) -> str:
        """Run everything; returns the reason why nothing could run, empty otherwise."""
        for process, value in self._processes([("facts", self.facts, 60.0)], 1):
            if value is not None:
                if "error" in value:
                    return str(value["error"])
                self.report.value.update(value)
            elif process.ended:
                return f"no facts about the device: {process.ended} {process.output[-300:]}"
        self.report.write()
        facts = self.report.value.items()
        print(", ".join(f"{key} {value}" for key, value in facts if key != "sections"), flush=True)
        self._check_and_compile()
        failed = self._failed()
        for section in sorted(self.sections, key=lambda section: section.name in failed):
            self._measure(section, failed)
        for section in self.sections:
            if section.is_alone:
                self._check_all([section], 1)
        return ""

    def left_s(self) -> float:
        """Seconds that are left."""
        return float("inf") if self.end is None else self.end - time.monotonic()

    def _stopped(self) -> str:
        """Why all processes have to end now."""
        if self.interrupted:
            return self.interrupted
        return OVER if self.left_s() < 0 else ""

    def _processes(
        self, tasks: list[tuple[str, Callable[[Send], None], float]], at_once: int
    ) -> Iterator[tuple[Process, dict[str, Any] | None]]:
        started = self._begun(tasks)
        return run_all(started, at_once, self._stopped)

    def _begun(
        self, tasks: list[tuple[str, Callable[[Send], None], float]]
    ) -> Iterator[tuple[str, Callable[[Send], None], float]]:
        """The tasks that are started, one by one."""
        for name, work, limit_s in tasks:
            if self.left_s() < _LEAST_S:
                return
            if not name.startswith(_COMPILE) and " " in name:
                part, section = name.split(" ", 1)
                self._part(section, part).update(state="under way")
                self.report.write()
            yield name, work, min(limit_s, self.left_s() + 60)  # the suite's end is another reason

    def _check_and_compile(self) -> None:
        begin = time.monotonic()
        self._check_all([section for section in self.sections if not section.is_alone], self.cores)
        self.compiled["wall_s"] = time.monotonic() - begin
        self.report.value["compiled"] = self.compiled
        self.report.write()
        print(
            f"checked, and compiled {self.compiled['kernels']} kernels "
            f"({self.compiled['seconds']:.0f} s of compilation) in {self.compiled['wall_s']:.0f} s",
            flush=True,
        )

    def _check_all(self, sections: list[Section], at_once: int) -> None:
        """Check sections, and then compile what they measure, in processes of their own."""
        threads = max(self.cores // at_once, 1) if at_once > 1 else 0
        place = replace(self.place, failed=self._failed())
        checks = [
            (f"check {section.name}", checking(section, place, threads), section.check_s)
            for section in sections
        ]
        limit_s = min(section.measure_s for section in sections) if sections else 0.0
        limit_s = min(limit_s, self.left_s() * _SHARE_TO_COMPILE)
        # afterwards: together they may fill the memory that a check needs
        compilations = [
            (f"{_COMPILE}{section.name}", compiling(section, place, i, threads), limit_s)
            for section in sections
            for i in range(section.shares > 1 if place.dry_run else section.shares)
        ]
        both = chain(self._processes(checks, at_once), self._processes(compilations, at_once))
        for process, value in both:
            name = process.name.split(" ", 1)[1]
            if value is not None and "compiled_s" in value:
                self.compiled["kernels"] += 1
                self.compiled["seconds"] += value["compiled_s"]
            elif process.name.startswith(_COMPILE):
                self._end_of_compilation(name, process, value)
            elif value is not None and "check" in value:
                self.report.section(name)["checks"].append(value["check"])
                self.report.write()
            else:
                self._end(name, "check", process, value)

    def _end_of_compilation(
        self, name: str, process: Process, value: dict[str, Any] | None
    ) -> None:
        """A kernel that was not compiled in time is compiled when it is measured."""
        if value is None and process.ended:
            self.compiled["incomplete"].append(f"{name}: {process.ended}")

    def _measure(self, section: Section, failed: frozenset[str]) -> None:
        place = replace(self.place, failed=failed)
        task = (f"measure {section.name}", measuring(section, place), section.measure_s)
        for process, value in self._processes([task], 1):
            if value is not None and "timing" in value:
                timings = self.report.section(section.name)["timings"]
                if not timings:
                    print(f"\n## {section.name}\n\n{_HEADING}")
                timings.append(value["timing"])
                self.report.write()
                print("\n".join(value["lines"]), flush=True)
            elif value is None or "compiled_s" not in value:
                self._end(section.name, "measure", process, value)

    def _end(self, name: str, part: str, process: Process, value: dict[str, Any] | None) -> None:
        """Note how a part of a section ended, or why it will end."""
        found = self._part(name, part)
        if value is not None:
            if "unsupported" in value:
                found.update(state="unsupported", reason=value["unsupported"])
            else:
                found["reason"] = value["error"]
            return
        found["seconds"] = time.monotonic() - process.begin
        if found["state"] == "under way":
            is_cut = process.ended in (OVER, self.interrupted)
            found["state"] = ("stopped" if is_cut else "failed") if process.ended else "complete"
        if process.ended:
            found["reason"] = found["reason"] or process.ended
            found["output"] = process.output
        self.report.write()
        if part == "check":
            self._print_checks(name)
        elif process.ended:
            print(f"{name}: not all was measured: {found['reason']}", flush=True)

    def _print_checks(self, name: str) -> None:
        checks, part = self.report.section(name)["checks"], self._part(name, "check")
        failed = self.report.failed(name)
        line = f"{name}: {len(checks) - len(failed)} of {len(checks)} checks passed"
        if part["reason"]:
            line += f"; {part['state']}: {part['reason']}"
        print(line, flush=True)
        for check in failed[:5]:
            print(f"FAILED {check['case']}: {check['figure']}, limit {check['limit']:.3g}")

    def _part(self, name: str, part: str) -> dict[str, Any]:
        found: dict[str, Any] = self.report.section(name)[part]
        return found

    def _failed(self) -> frozenset[str]:
        """Sections with a wrong result, or whose checks did not end or did not start."""
        return frozenset(
            section.name
            for section in self.sections
            if self.report.failed(section.name)
            or (self._part(section.name, "check")["state"] != "complete" and not section.is_alone)
        )


def chosen(sections: list[Section], names: list[str]) -> list[Section]:
    """The sections with these names, and those that they require."""
    required = {
        other for section in sections if section.name in names for other in section.requires
    }
    return [section for section in sections if section.name in {*names, *required}]

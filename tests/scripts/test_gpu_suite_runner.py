"""The suite's processes, time limits, report and summary, with sections that break in every way."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.gpu_suite.harness import Check, Place, Timing
from scripts.gpu_suite.runner.goals import against, largest, tflops
from scripts.gpu_suite.runner.process import Send, run_all
from scripts.gpu_suite.runner.report import Report
from scripts.gpu_suite.runner.section import Section, Unsupported
from scripts.gpu_suite.runner.suite import OVER, Suite, chosen
from scripts.gpu_suite.runner.summary import Goal, is_sound, summary

CPU = Place(torch.device("cpu"), dry_run=True)
GOALS = [
    Goal("fast", "good", tflops("row"), 1000, " TF/s"),
    Goal("as fast as a peer", "good", against("row", "peer"), 1.0, "x"),
    Goal("too slow", "crash", tflops("row"), 1001, " TF/s"),
    Goal("of no section here", "absent", tflops(""), 1),
]


def passing(_: Place) -> Iterator[Check]:
    yield Check("right", 0.0, 1.0)


def rows(*milliseconds: float) -> Callable[[Place], Iterator[Timing]]:
    def measure(place: Place) -> Iterator[Timing]:
        for i, ms in enumerate(milliseconds):
            print(f"row {i}")
            yield Timing(f"row {i}", {"ours": ms, "peer": 2 * ms}, flops=4e12)

    return measure


def breaking(how: Callable[[], Any], after: int = 1) -> Callable[[Place], Iterator[Any]]:
    """Yields some results, then breaks."""

    def part(_: Place) -> Iterator[Any]:
        for i in range(after):
            yield Timing(f"row {i}", {"ours": 1.0}, flops=1e12)
        print("the last words")
        sys.stdout.flush()
        how()

    return part


def crash() -> None:
    raise ValueError("an illegal\naddress")


def die() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hang() -> None:
    """With a child of its own, which must end as well."""
    if os.fork() == 0:
        os.execvp("sleep", ["sleep", "86321"])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)


def told(send: Send) -> None:
    send({"device": "a device", "commit": "abc"})


class Watched(Report):
    """Reads the file after every write, as the user of a killed suite would."""

    n_writes = 0

    def write(self) -> None:
        super().write()
        if self.path is not None:
            assert json.loads(self.path.read_text()) == self.value
            self.n_writes += 1


def ran(
    path: Path, *sections: Section, left_s: Callable[[], float] | None = None
) -> tuple[Watched, list[str]]:
    """The report and the summary of a suite. left_s: its time that is left, if that is limited."""
    report = Watched(path, [section.name for section in sections])
    suite = Suite([*sections], CPU, report, None, told)
    if left_s is not None:
        suite.left_s = left_s  # type: ignore[method-assign]
    assert suite.run() == ""
    return report, summary(report, GOALS, fake=False)


def test_a_section_that_breaks_ends_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It raises, is killed by a signal, hangs; in its checks, in its times, while it compiles. What
    it found before is kept, and the other sections run."""
    path = tmp_path / "report.json"
    report, lines = ran(
        path,
        Section("crash", passing, breaking(crash), shares=2),
        Section("signal", passing, breaking(die, 2), shares=0),
        Section("hang", passing, breaking(hang), measure_s=2.5, shares=0),
        Section("wrong", lambda _: iter([Check("off", float("nan"), 1.0)]), rows(9.0), shares=0),
        Section("no checks", breaking(die, 0), rows(5.0), shares=0),
        Section("good", passing, rows(2.0, 4.0), shares=2),
    )
    found = report.value["sections"]
    states = {name: (part["check"]["state"], part["measure"]["state"], len(part["timings"]))
              for name, part in found.items()}  # fmt: skip
    assert states == {
        "crash": ("complete", "failed", 1), "signal": ("complete", "failed", 2),
        "hang": ("complete", "failed", 1), "wrong": ("complete", "complete", 1),
        "no checks": ("failed", "complete", 1), "good": ("complete", "complete", 2),
    }  # fmt: skip
    assert found["crash"]["measure"]["reason"] == "ValueError: an illegal"
    assert "the last words" in found["crash"]["measure"]["output"]
    assert found["signal"]["measure"]["reason"] == "killed by SIGSEGV"
    assert "its time limit" in found["hang"]["measure"]["reason"]
    assert not running("86321"), "a process that it started is left"
    assert report.value["compiled"]["incomplete"] == ["crash: exit code 1"]
    assert json.loads(path.read_text()) == report.value and report.n_writes > 15
    text = "\n".join(lines)
    assert "a device" in lines[0] and "4 of 5 checks passed" in lines[-1]
    assert "FAILED: signal, measure: killed by SIGSEGV" in text
    assert "FAILED: wrong: off: None, limit 1" in text
    assert [line.split()[-1] for line in lines[1:4]] == ["met", "met", "MISSED"]
    assert "absent" not in text and not is_sound(report)
    printed = capsys.readouterr().out
    assert printed.index("## good") < printed.index("## wrong"), "wrong kernels are timed last"


def running(word: str) -> bool:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes().split(b"\0"):
                return True
        except OSError:
            continue
    return False


def test_what_does_not_fit_into_the_time_is_named(tmp_path: Path) -> None:
    begun = tmp_path / "begun"

    def slow(place: Place) -> Iterator[Timing]:
        yield from rows(1.0)(place)
        begun.touch()
        time.sleep(600)

    report, lines = ran(
        tmp_path / "report.json",
        Section("first", passing, slow, shares=0),
        Section("second", passing, rows(1.0), shares=0),
        Section("last", passing, shares=0, is_alone=True),
        left_s=lambda: -1.0 if begun.exists() else 1e6,
    )
    parts = report.value["sections"]
    assert parts["first"]["measure"]["state"] == "stopped" and len(parts["first"]["timings"]) == 1
    assert parts["second"]["measure"]["state"] == "not started"
    assert f"not measured: first, measure: stopped after 1 results: {OVER}" in lines
    assert "not measured: second, measure: not started after 0 results: no time left" in lines
    assert "not measured: last, check: not started after 0 results: no time left" in lines
    assert is_sound(report), "nothing that ran was wrong"


def test_the_time_is_counted_from_the_start() -> None:
    suite = Suite([], CPU, Report(None, []), 2.0, told)
    assert 100 < suite.left_s() <= 120
    assert Suite([], CPU, Report(None, []), None, told).left_s() == float("inf")


def test_a_section_for_another_device_is_no_failure(tmp_path: Path) -> None:
    def other(_: Place) -> Iterator[Check]:
        raise Unsupported("needs a Hopper GPU")
        yield

    seen = tmp_path / "failed"

    def reader(place: Place) -> Iterator[Timing]:
        seen.write_text(" ".join(place.failed))
        yield from ()

    report, lines = ran(
        tmp_path / "report.json", Section("other", other),
        Section("reader", passing, reader, requires=("other",)),
    )  # fmt: skip
    assert seen.read_text() == "other", "what depends on it is notified"
    assert is_sound(report) and any(
        "unsupported after 0 results: needs a Hopper" in x for x in lines
    )
    sections = [Section(name, passing, requires=("a",) * (name == "b")) for name in "abc"]
    assert [section.name for section in chosen(sections, ["b"])] == ["a", "b"]


def test_an_interrupt_ends_with_a_summary(tmp_path: Path) -> None:
    def waiting(place: Place) -> Iterator[Timing]:
        yield from rows(1.0)(place)
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(60)

    path = tmp_path / "report.json"
    pid = os.fork()
    if pid == 0:
        from scripts.gpu_suite.__main__ import run

        sections = [Section("a", passing, waiting, shares=0), Section("b", passing, rows(1.0))]
        with open(tmp_path / "out", "w") as out:
            os.dup2(out.fileno(), 1)
            sys.stdout = out
            code = run(sections, CPU, path, None, GOALS)
            out.flush()
        os._exit(int(code))
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 1
    parts = json.loads(path.read_text())["sections"]
    assert parts["a"]["measure"]["reason"] == "interrupted by SIGTERM"
    assert parts["b"]["measure"]["state"] == "not started"
    assert "2 of 2 checks passed" in (tmp_path / "out").read_text().splitlines()[-1]


def test_many_processes_and_large_messages() -> None:
    def work(i: int) -> Callable[[Send], None]:
        def run(send: Send) -> None:
            for part in range(3):
                send({"i": i, "part": part, "text": "x" * 300_000})

        return run

    received: dict[str, list[int]] = {}
    ends = 0
    for process, value in run_all([(f"p{i}", work(i), 30.0) for i in range(5)], 3, lambda: ""):
        if value is None:
            ends += 1
            assert process.ended == ""
        else:
            assert len(value["text"]) == 300_000
            received.setdefault(process.name, []).append(value["part"])
    assert ends == 5 and received == {f"p{i}": [0, 1, 2] for i in range(5)}


def test_a_full_disk_does_not_end_the_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report(tmp_path / "report.json", ["good"])
    monkeypatch.setattr("scripts.gpu_suite.runner.report.replace_text", full)
    report.write()
    report.write()
    assert capsys.readouterr().out.count("No space left") == 1


def full(path: Path, text: str) -> None:
    raise OSError(28, "No space left on device", str(path))


def test_figures_of_goals() -> None:
    timed: list[dict[str, Any]] = [
        {"case": "nt 1", "milliseconds": {"ours": 2.0, "ours in Gluon": 1.0, "peer": 3.0},
         "flops": 1e12, "host_copies": [1, 4]},
        {"case": "nt 2", "milliseconds": {"ours": 4.0}, "flops": 1e12, "host_copies": 2},
        {"case": "tn", "milliseconds": {"peer": 1.0}, "flops": None},
    ]  # fmt: skip
    assert tflops("^nt")(timed) == 250.0 and tflops("nothing")(timed) is None
    assert tflops("nt 1")(timed) == 1000.0, "the better of our two kernels"
    assert against("", "peer")(timed) == 3.0 and against("nt 2", "peer")(timed) is None
    assert largest("", "host_copies")(timed) == 4 and largest("tn", "host_copies")(timed) is None

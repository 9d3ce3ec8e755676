"""The GPU suite without a GPU: a dry run of all of it, its refusal, its imports, its clock."""

import json
import os
import re
import stat
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import tomli
import torch

from kernels.gemm import gemm_fp8
from scripts.gpu_suite import gemm, harness, sanitizer
from scripts.gpu_suite.__main__ import main
from scripts.gpu_suite.harness import Check, Place, Timing, measure
from scripts.gpu_suite.runner.section import Section
from scripts.gpu_suite.sections import SECTIONS
from tests import forks
from tests.runs import ROOT, run

CPU = Place(torch.device("cpu"), dry_run=True)
NEEDED = {"torch", "triton", "numpy"}


def missing() -> list[str]:
    """The modules of all dependencies that a bare machine with a GPU does not have."""
    project = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    names = {re.split(r"[\[>=<;~ ]", line)[0] for line in [*project["dependencies"], *extras]}
    found = sorted(name.replace("-", "_") for name in names - NEEDED)
    assert {"torchtitan", "tomli"} <= {*found}
    return [*found, "rich"]


def suite(*arguments: object, first: str, env: dict[str, str]) -> str:
    """What the suite prints, on a machine with torch, triton and numpy only. first: what is run
    before it."""
    given = ["gpu_suite", *map(str, arguments)]
    program = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({missing()!r})); {first};"
        f"sys.argv = {given!r};"
        "runpy.run_module('scripts.gpu_suite', run_name='__main__')"
    )
    done = run("-c", program, modules=forks.TORCH, env=env)
    return done.stdout + done.stderr


FEW = ["gluon", "gemm", "attention", "sanitizer"]
"""Sections with everything that a run has; `test_every_section_begins` has the others."""
TWO_SHAPES = "from scripts.gpu_suite import gemm; del gemm.CHECKED[3:], gemm.CHECKED[1]"
"""Of a dry run of few sections, whose `gluon` and `gemm` check the same reference."""
ALL = [section.name for section in SECTIONS]


@pytest.mark.long
@pytest.mark.parametrize(
    "names", [FEW, pytest.param(ALL, marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_a_dry_run_walks_all_of_it_on_a_bare_machine(names: list[str], tmp_path: Path) -> None:
    """All checks and times of sections, of all also the training step and the server's step; and a
    tool that observes the barriers, here a program that finds nothing."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\necho '========= ERROR SUMMARY: 0 errors'\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    path = tmp_path / "results.json"
    path_of_tools = f"{tmp_path}:{os.environ['PATH']}"
    words = ["--dry-run", "--json", path, "--minutes", 9, "--sections", *names]
    first = TWO_SHAPES if names is FEW else "pass"
    printed = suite(*words, first=first, env={"PATH": path_of_tools})
    report = json.loads(path.read_text())
    assert report["device"] == "CPU, dry run" and report["torch"] == torch.__version__
    assert set(report["attention"].values()) <= {"MATH", "FLASH_ATTENTION"}
    assert [*report["sections"]] == names
    for section in (section for section in SECTIONS if section.name in names):
        found = report["sections"][section.name]
        assert len(found["checks"]) > 1, section.name
        assert found["check"]["state"] == found["measure"]["state"] == "complete", found
        assert all(check["figure"] <= check["limit"] for check in found["checks"])
        assert bool(found["timings"]) == (section.name not in ("gluon", "sanitizer"))
    first = report["sections"]["gemm"]["timings"][0]
    assert first["flops"] == 2 * 64**3 and first["milliseconds"]["bf16"] == harness.FAKE_MS
    assert first["missing"]["ours in Gluon"] == "no CUDA device"
    assert "| nt 64x64x64 | DeepGEMM | not run: No module named 'deep_gemm'" in printed
    last = printed[printed.index("== CPU") :].splitlines()
    assert "Times are invented" in last[1] and len(last) < 40
    assert last[-1].endswith("checks passed") and "FAILED" not in printed


@pytest.mark.parametrize(
    "section", [s for s in SECTIONS if s.name not in FEW], ids=lambda s: s.name
)
def test_every_section_begins(section: Section) -> None:
    """The first check and the first time of each."""
    assert next(section.check(CPU)).passed
    assert next(section.measure(CPU)).milliseconds


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_device_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_suite"])
    with pytest.raises(SystemExit, match="no CUDA device: nothing measured"):
        main()
    monkeypatch.setattr(sys, "argv", ["gpu_suite", "--dry-run", "--minutes", "0"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "--minutes must be positive" in capsys.readouterr().err


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gemm_fp8.gemm_fp8_nt

    def wrong(*arguments: Any, **options: Any) -> torch.Tensor:
        out = right(*arguments, **options)
        out[-1:, -1:] *= 1.1
        return out

    monkeypatch.setattr(gemm_fp8, "gemm_fp8_nt", wrong)
    assert any(not check.passed for check in gemm.check(CPU, shapes=[(1, 1, 1)]))


def test_measure_lets_peers_fail_but_not_ours() -> None:
    def broken() -> None:
        raise RuntimeError("no such\nkernel")

    timing = measure("x", {"ours": lambda: None, "peer": broken}, CPU, flops=1.0)
    assert timing.missing == {"peer": "no such"} and list(timing.milliseconds) == ["ours"]
    with pytest.raises(RuntimeError):
        measure("x", {"ours": broken}, CPU)


def test_compilation_runs_a_share_of_ours_once() -> None:
    calls: list[str] = []
    for i in range(2):
        place = Place(CPU.device, True, share=(i, 2), _rows=count())
        for row in ("a", "b", "c"):
            names = (f"ours {row}", f"peer {row}")
            measure(row, {name: lambda name=name: calls.append(name) for name in names}, place)  # type: ignore[misc]
    assert calls == ["ours a", "ours c", "ours b"]


class Device:
    """A device whose queue the host fills: time passes only where it is said."""

    def __init__(self, host_s: float, kernel_s: float, waits: bool) -> None:
        self.host_s, self.kernel_s, self.waits = host_s, kernel_s, waits
        self.now = self.free = 0.0
        """Times of the host, and at which the device has done everything."""

    def enqueue(self, seconds: float) -> None:
        self.free = max(self.free, self.now) + seconds

    def run(self) -> None:
        self.now += self.host_s
        self.enqueue(self.kernel_s)
        if self.waits:
            self.now = self.free
            self.now += self.host_s
            self.enqueue(self.kernel_s)

    def event(self, **_: object) -> Any:
        device = self

        class Event:
            def record(self) -> None:
                device.enqueue(0.0)
                self.at = device.free

            def query(self) -> bool:
                return device.now >= self.at

            def synchronize(self) -> None:
                device.now = max(device.now, self.at)

            def elapsed_time(self, end: Any) -> float:
                return (end.at - self.at) * 1e3

        return Event()


@pytest.mark.parametrize("waits", [False, True])
def test_a_kernel_time_has_no_host_time(monkeypatch: pytest.MonkeyPatch, waits: bool) -> None:
    """200 us of Python before a kernel of 100 us do not count; a function that waits for the device
    is reported."""
    device = Device(200e-6, 100e-6, waits)
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(
        torch.cuda, "_sleep", lambda cycles: device.enqueue(cycles / harness._CLOCK_HZ)
    )
    monkeypatch.setattr(harness.time, "perf_counter", lambda: device.now)
    monkeypatch.setattr(harness, "_flush", [torch.zeros(1)])
    clock = harness._Clock(device.run, torch.device("cpu"))
    device.host_s *= 5  # slower than when it was first called
    assert clock.milliseconds() == pytest.approx(0.1 if not waits else 1.2)
    assert clock.is_host_bound == waits


def test_rates() -> None:
    timing = Timing("x", {"ours": 2.0, "peer": 3.0}, flops=2e12, host_bound=("peer",))
    assert list(timing.lines()) == [
        "| x | ours | 2.0000 | 1,000 TFLOP/s | 1.00 |",
        "| x | peer (host) | 3.0000 | 667 TFLOP/s | 1.50 |",
    ]
    assert Timing("x", {"ours": 1.0}, bytes=1e9).rate("ours") == "1,000 GB/s"
    assert not Check("x", float("nan"), 1.0).passed


def test_the_sanitizer_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number of errors; an error if it could not run."""
    tool = tmp_path / "compute-sanitizer"
    monkeypatch.setattr(sanitizer, "FOLDERS", (str(tmp_path),))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert sanitizer.installed() is None
    tool.write_text(
        '#!/bin/sh\n[ "$2" = synccheck ] && echo "ERROR SUMMARY: 3 errors" && exit 1\n'
        '[ "$2" = memcheck ] && echo "ERROR SUMMARY: 0 errors" || echo "no device"\n'
    )
    tool.chmod(0o755)
    results = sanitizer.check(CPU)
    assert next(results).passed
    found = next(results)
    assert not found.passed and found.figure == 3
    with pytest.raises(RuntimeError, match="racecheck: no device"):
        next(results)

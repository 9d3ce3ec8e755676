"""The GPU suite without a GPU: its logic, its refusal, its imports."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli
import torch

from kernels.gemm import gemm_fp8
from scripts.gpu_suite import gemm
from scripts.gpu_suite.__main__ import SECTIONS, main
from scripts.gpu_suite.harness import Check, Place, Timing, measure
from tests import forks
from tests.runs import ROOT, run

CPU = Place(torch.device("cpu"), dry_run=True)


def suite(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_suite", *map(str, arguments)])
    main()


def test_dry_run_checks_every_section(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    suite(monkeypatch, "--dry-run", "--check-only", "--json", path)
    report = json.loads(path.read_text())
    assert report["device"] == "CPU, dry run" and report["torch"] == torch.__version__
    printed = capsys.readouterr().out
    for name in SECTIONS:
        checks = report[name]["checks"]
        assert len(checks) > 1 and all(c["figure"] <= c["limit"] for c in checks)
        assert report[name]["timings"] == []
        assert f"## {name}: {len(checks)} of {len(checks)} checks passed" in printed


def test_dry_run_times_and_names_missing_peers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    suite(monkeypatch, "--dry-run", "--sections", "layers", "gemm", "--json", path)
    report = json.loads(path.read_text())
    assert "quantize" not in report
    first = report["gemm"]["timings"][0]
    assert first["flops"] == 2 * 64**3 and first["milliseconds"]["bf16"] > 0
    assert "DeepGEMM" in first["missing"]
    assert first["missing"]["ours in Gluon"] == "no CUDA device"
    assert "| nt 64x64x64 | DeepGEMM | not run: No module named 'deep_gemm'" in (
        capsys.readouterr().out
    )


def test_a_wrong_kernel_fails_and_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = gemm_fp8.gemm_fp8_nt

    def wrong(*arguments: Any, **options: Any) -> torch.Tensor:
        out = right(*arguments, **options)
        out[-1:, -1:] *= 1.1
        return out

    monkeypatch.setattr(gemm_fp8, "gemm_fp8_nt", wrong)
    path = tmp_path / "results.json"
    with pytest.raises(SystemExit, match="checks failed"):
        suite(monkeypatch, "--dry-run", "--sections", "gemm", "--json", path)
    assert "FAILED gemm_fp8_nt" in capsys.readouterr().out
    assert json.loads(path.read_text())["gemm"]["timings"] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_device_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="no CUDA device: nothing measured"):
        suite(monkeypatch)


def test_measure_lets_peers_fail_but_not_ours() -> None:
    def broken() -> None:
        raise RuntimeError("no such\nkernel")

    timing = measure("x", {"ours": lambda: None, "peer": broken}, CPU, flops=1.0)
    assert timing.missing == {"peer": "no such"} and list(timing.milliseconds) == ["ours"]
    with pytest.raises(RuntimeError):
        measure("x", {"ours": broken}, CPU)


def test_gluon_is_not_timed_where_its_checks_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is reported for a process that fails, and the time limit for one that hangs."""
    outcomes: list[object] = [
        subprocess.CompletedProcess([], 1, "warning\nneeds a Hopper GPU\n", "leaked\n"),
        subprocess.CompletedProcess([], -11, "", ""),
        subprocess.TimeoutExpired([], 1.0),
        subprocess.CompletedProcess([], 0, "50 checks passed", ""),
    ]

    def run(*arguments: object, **options: object) -> object:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(subprocess, "run", run)
    problem = gemm.gluon_problem.__wrapped__
    assert problem("cuda") == "needs a Hopper GPU"
    assert problem("cuda") == "its checks ended with code -11"
    assert problem("cuda") == "its checks did not end in 120 s"
    assert problem("cuda") is None


def test_rates() -> None:
    timing = Timing("x", {"ours": 2.0, "peer": 3.0}, flops=2e12)
    assert list(timing.lines()) == [
        "| x | ours | 2.0000 | 1,000 TFLOP/s | 1.00 |",
        "| x | peer | 3.0000 | 667 TFLOP/s | 1.50 |",
    ]
    assert Timing("x", {"ours": 1.0}, bytes=1e9).rate("ours") == "1,000 GB/s"
    assert not Check("x", float("nan"), 1.0).passed


def test_it_needs_torch_triton_and_numpy_only() -> None:
    """Runs with all other dependencies of the project missing, also while it trains a model."""
    project = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {"torch", "triton", "numpy"}
    names = {re.split(r"[\[>=<;~ ]", line)[0] for line in project["dependencies"]}
    missing = sorted(name.replace("-", "_") for name in names - needed)
    assert "torchtitan" in missing and "tomli" in missing
    code = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({missing!r}));"
        "sys.argv = ['', '--dry-run', '--check-only', '--sections', 'training', 'moe', 'serve'];"
        "runpy.run_module('scripts.gpu_suite', run_name='__main__')"
    )
    done = run("-c", code, modules=forks.TORCH)
    assert "## training: 2 of 2 checks passed" in done.stdout

"""Every Triton kernel in Triton's interpreter: `interpreted_*.py` in processes of their own, since
the interpreter is chosen when Triton is imported."""

import subprocess
import sys

import pytest

from tests.runs import ROOT, environment

LANE = ["-p", "tests.kernels.lane", "-p", "no:cacheprovider"]
HERE = ROOT / "tests" / "kernels"


@pytest.mark.parametrize("file", sorted(file.name for file in HERE.glob("interpreted_*.py")))
def test_interpreted(file: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *LANE, str(HERE / file)],
        cwd=ROOT, env=environment() | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout.splitlines()[-1], done.stdout

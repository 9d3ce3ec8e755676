"""Every Triton kernel in Triton's interpreter: `interpreted.py` in a process of its own, since the
interpreter is chosen when Triton is imported."""

import subprocess
import sys

import pytest

from tests.runs import ROOT, environment


@pytest.mark.parametrize("kernels", ["quantize", "gemm", "linear or swiglu"])
def test_interpreted(kernels: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-k", kernels, str(ROOT / "tests" / "kernels" / "interpreted.py")],
        cwd=ROOT, env=environment() | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout.splitlines()[-1], done.stdout

"""Every Triton kernel in Triton's interpreter: `interpreted_*.py` run in a separate process,
because the interpreter is selected when Triton is imported."""

from pathlib import Path

import pytest

from tests import forks
from tests.runs import run

LANE = ["-p", "tests.kernels.interpreted.lane", "-p", "no:cacheprovider"]
ENVIRONMENT = {"TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
FILES = sorted(Path(__file__).parent.glob("interpreted_*.py"))


def interpret(*words: object, timeout: float = 600) -> None:
    lane = ["-m", "pytest", "-q", "-x", *LANE, *words]
    done = run(*lane, modules=forks.TRITON, env=ENVIRONMENT, timeout=timeout)
    assert " passed" in done.stdout.splitlines()[-1], done.stdout


@pytest.mark.long
def test_every_value_of_every_parameter() -> None:
    interpret(*FILES, "--few")


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_all_parameters(file: Path) -> None:
    interpret(file, timeout=7200)

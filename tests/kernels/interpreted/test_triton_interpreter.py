"""Every Triton kernel in Triton's interpreter: `interpreted_*.py` run in separate processes,
because the interpreter is selected when Triton is imported."""

import ast
from pathlib import Path

import pytest

from tests import forks
from tests.runs import run

LANE = ["-p", "tests.kernels.interpreted.lane", "-p", "no:cacheprovider"]
ENVIRONMENT = {"TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
FILES = sorted(Path(__file__).parent.glob("interpreted_*.py"))
AT_ONCE = 20


def parts(file: Path) -> list[list[str]]:
    """Groups of tests per process, so that each start of the interpreter takes a few seconds."""
    body = ast.parse(file.read_text()).body
    names = [f.name for f in body if isinstance(f, ast.FunctionDef) and f.name.startswith("test_")]
    return [names[i : i + AT_ONCE] for i in range(0, len(names), AT_ONCE)]


def interpret(*words: object, timeout: float = 600) -> None:
    lane = ["-m", "pytest", "-q", "-x", *LANE, *words]
    done = run(*lane, modules=forks.TRITON, env=ENVIRONMENT, timeout=timeout)
    assert " passed" in done.stdout.splitlines()[-1], done.stdout


@pytest.mark.long
@pytest.mark.parametrize(
    ("file", "names"),
    [
        pytest.param(file, names, id=f"{file.stem}-{i}")
        for file in FILES
        for i, names in enumerate(parts(file))
    ],
)
def test_every_two_parameters(file: Path, names: list[str]) -> None:
    interpret(*[f"{file}::{name}" for name in names], "--pairwise")


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_all_parameters(file: Path) -> None:
    interpret(file, timeout=7200)

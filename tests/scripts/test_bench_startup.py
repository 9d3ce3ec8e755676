"""What commands import before they know what to do."""

import pytest

from scripts.bench_startup import BUDGET, imports_of

FEW = {"train", "serve bench", "launch.slurm", "scripts.demo"}
"""Commands whose help imports no package of the list; the others import torch, which takes
seconds."""


@pytest.mark.parametrize(
    "command",
    [pytest.param(c, marks=[pytest.mark.slow] * (c not in FEW)) for c in BUDGET],
)
def test_help_imports_what_its_budget_allows(command: str) -> None:
    _, found = imports_of(command)
    assert found <= BUDGET[command]

"""Numbers that are not finite, or whose squares overflow, stop every rank with an error that names
them."""

import json
from pathlib import Path

import pytest

from tests.runs import run


@pytest.mark.long
@pytest.mark.parametrize("words", [[], pytest.param(["all"], marks=pytest.mark.slow)], ids=str)
def test_numbers_out_of_range_stop_the_step_and_are_named(words: list[str], tmp_path: Path) -> None:
    run("tests/parallel/non_finite_run.py", tmp_path, *words, ranks=2)
    faults = json.loads((tmp_path / "faults.json").read_text())
    assert not faults, "\n".join(faults)

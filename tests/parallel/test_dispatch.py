"""All dispatchers against plain loops, on 1 to 4 ranks; see tests/parallel/dispatch_run.py."""

import json
from collections.abc import Callable
from functools import cache

import pytest

from tests.parallel.dispatch_run import variants
from tests.parallel.dispatch_special import SPECIAL
from tests.runs import run

Faults = dict[str, list[str]]


@pytest.fixture(scope="module")
def faults_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Faults]:
    """Faults per check on so many ranks; their processes start once for all checks."""

    @cache
    def faults(ranks: int) -> Faults:
        out = tmp_path_factory.mktemp("dispatch") / "faults.json"
        run("tests/parallel/dispatch_run.py", out, ranks=ranks)
        found: Faults = json.loads(out.read_text())
        return found

    return faults


@pytest.mark.parametrize(
    ("ranks", "name"),
    [
        pytest.param(ranks, name, marks=[pytest.mark.slow] if ranks == 3 else [])
        for ranks in (1, 2, 3, 4)
        for name in (*variants(ranks), *SPECIAL)
    ],
)
def test_dispatcher(ranks: int, name: str, faults_of: Callable[[int], Faults]) -> None:
    faults = faults_of(ranks)[name]
    assert not faults, "\n".join(faults)

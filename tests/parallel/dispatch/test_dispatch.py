"""All dispatchers against plain loops, on 1 to 4 ranks; see `dispatch_run.py`."""

import json
from collections.abc import Callable
from functools import cache

import pytest

from tests.parallel.dispatch.dispatch_run import variants
from tests.parallel.dispatch.dispatch_special import SPECIAL
from tests.runs import run

SEEDS = 8
"""Random cases per dispatcher."""
AT_ONCE = {1: 40, 2: 40, 3: 40, 4: 13}
"""Checks that share a start of so many ranks."""
Faults = dict[str, list[str]]


def names(ranks: int) -> list[str]:
    return [*variants(ranks), *SPECIAL]


@pytest.fixture(scope="module")
def faults_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int, int], Faults]:
    """Faults of checks that share their processes, by ranks, number of the first and cases."""

    @cache
    def faults(ranks: int, first: int, seeds: int) -> Faults:
        out = tmp_path_factory.mktemp("dispatch") / "faults.json"
        some = names(ranks)[first : first + AT_ONCE[ranks]]
        run("tests/parallel/dispatch/dispatch_run.py", out, seeds, *some, ranks=ranks)
        found: Faults = json.loads(out.read_text())
        return found

    return faults


@pytest.mark.long
@pytest.mark.parametrize(
    ("ranks", "name", "seeds"),
    [
        pytest.param(ranks, name, seeds, marks=[pytest.mark.slow] if slow else [])
        for ranks, seeds, slow in ((1, SEEDS // 4, False), (1, SEEDS, True),
                                   (2, SEEDS // 2, False), (2, SEEDS, True), (3, SEEDS, True),
                                   (4, SEEDS // 4, False), (4, SEEDS, True))
        for name in names(ranks)
    ],
)  # fmt: skip
def test_dispatcher(
    ranks: int, name: str, seeds: int, faults_of: Callable[[int, int, int], Faults]
) -> None:
    place = names(ranks).index(name)
    faults = faults_of(ranks, place - place % AT_ONCE[ranks], seeds)[name]
    assert not faults, "\n".join(faults)

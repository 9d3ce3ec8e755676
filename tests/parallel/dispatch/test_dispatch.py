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
OF_FOUR = (
    "all_to_all", "all_to_all-fp8-both-ways", "all_to_all-between-nodes", "overlapped", "sync_free",
    "hierarchical-2", "hierarchical-2-fp8", "hierarchical-2-fp8-both-ways",
    "hierarchical-2-overlapped",
)  # fmt: skip
"""Checks that run on four ranks by default: every plan, and all of what two ranks cannot run."""
Faults = dict[str, list[str]]


def names(ranks: int, some: bool = False) -> list[str]:
    """All checks, or those of the default run."""
    return [n for n in (*variants(ranks), *SPECIAL) if not some or ranks < 4 or n in OF_FOUR]


@pytest.fixture(scope="module")
def faults_of(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[int, tuple[str, ...], int], Faults]:
    """Faults of checks that share their processes, by ranks, names and cases."""

    @cache
    def faults(ranks: int, some: tuple[str, ...], seeds: int) -> Faults:
        out = tmp_path_factory.mktemp("dispatch") / "faults.json"
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
        for name in names(ranks, some=not slow)
    ],
)  # fmt: skip
def test_dispatcher(
    ranks: int,
    name: str,
    seeds: int,
    faults_of: Callable[[int, tuple[str, ...], int], Faults],
) -> None:
    listed = names(ranks, some=seeds < SEEDS)
    first = listed.index(name) // AT_ONCE[ranks] * AT_ONCE[ranks]
    faults = faults_of(ranks, tuple(listed[first : first + AT_ONCE[ranks]]), seeds)[name]
    assert not faults, "\n".join(faults)


def test_only_checks_that_two_ranks_run_are_left_out_on_four() -> None:
    assert set(names(4)) - set(OF_FOUR) < set(names(2)) and set(OF_FOUR) < set(names(4))

"""Distribution of tests among processes, their time limits, and a small corpus for runs."""

import gc
import os
import random
import re
import statistics
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from parallel.launch_environment import disable_amx
from tests import forks

LIMIT_S = 10.0
"""Limit for each test not marked slow, and for its fixtures, on the reference machine."""
LONG_S = 60.0
"""The same limit for tests marked long."""
REFERENCE_S = 0.0155
"""CPU time of `slowness` on the reference machine: a core of an AMD EPYC 9004."""
LONG = (
    "launch/test_slurm_cluster.py", "train", "parallel", "launch", "scripts",
    "test_documentation.py", "serve", "kernels",
)  # fmt: skip
"""Folders and files that run long are started first, because the last file to start determines when
the run ends."""

_WORDS = "def return for in if else self value index list dict print range token expert".split()


def pytest_configure() -> None:
    disable_amx()  # importing `serve` does, whichever tests run: tests/test_amx.py enables it
    os.environ.setdefault(forks.SESSION, str(os.getpid()))  # processes started later inherit it


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two workers per core, because many tests wait for the processes that they started, with 4 GiB
    each; none if GPU tests are selected."""
    if re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(2 * (cores or 1), memory // 2**32))


STARTED = pytest.StashKey[float]()
"""CPU time at the start of a test."""


def pytest_sessionstart() -> None:
    gc.disable()  # collecting imports all modules, and creates little garbage


def pytest_collection_finish() -> None:
    gc.freeze()  # the collector does not visit modules and tests again
    gc.set_threshold(20_000)
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONG)}
    here = Path(__file__).parent

    def place(item: pytest.Item) -> tuple[int, int]:
        if not item.path.is_relative_to(here):
            return len(LONG), 0
        path = item.path.relative_to(here)
        first = places.get(path.as_posix(), places.get(path.parts[0], len(LONG)))
        return first, -len(path.parts)  # inner rooms have the longest files

    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    item.stash[STARTED] = cpu_time()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let an unmarked test that takes too long fail.

    The time of a test is the CPU time of all its processes and of its fixtures, or the wall time if
    that is less (several processes run in parallel), but at least a tenth of the wall time. It is
    divided by the measured slowness of the machine, so neither a busy nor a slow machine makes a
    test fail.
    """
    report = yield
    exempt = any(item.get_closest_marker(name) for name in ("slow", "gpu"))
    limit = LONG_S if item.get_closest_marker("long") else LIMIT_S
    if exempt or item.config.option.usepdb or call.duration < limit:
        return report
    cpu = cpu_time() - item.stash[STARTED]
    spent = max(min(cpu, call.duration), call.duration / 10) / slowness()
    if spent > limit and report.outcome == "passed":
        report.outcome = "failed"
        report.longrepr = (
            f"{item.nodeid}: {report.when} took {spent:.0f} s of {limit:.0f} ({call.duration:.0f}"
            f" s on the clock): make it faster, or mark it slow and keep a part of it that is not"
        )
    return report


def cpu_time() -> float:
    """CPU seconds of this process and of all ended processes that it started."""
    own = os.times()
    return sum(own[:4]) + forks.cpu_time()


def slowness() -> float:
    """Ratio of the time of a fixed loop now to that on the reference machine; at least 1."""
    times = []
    for _ in range(5):
        start, total = time.process_time(), 0
        for i in range(300_000):
            total += i * i % 7
        times.append(time.process_time() - start)
    return max(1.0, statistics.median(times) / REFERENCE_S)


@pytest.fixture(autouse=True, scope="module")
def no_process_group_left() -> Iterator[None]:
    """Assert that no module leaves its default process group behind, which would break later
    modules."""
    yield
    if "torch.distributed" in sys.modules:
        left = sys.modules["torch.distributed"].is_initialized()
        assert not left, "a test of this module left its process group"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 text files of unequal length."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    for i in range(60):
        lines = [
            " ".join(rng.choices(_WORDS, k=rng.randint(2, 9))) + f" {rng.randint(0, 99)}"
            for _ in range(rng.randint(3, 60))
        ]
        (folder / f"{i:03}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def overrides(corpus: Path, tmp_path: Path) -> list[str]:
    """Overrides that point tests/tiny.toml to the corpus and to folders of this test."""
    return [
        f"--data.source={corpus}",
        f"--data.cache_dir={corpus.parent / 'corpus-cache'}",
        f"--run.dir={tmp_path / 'run'}",
    ]

"""A process that trains on a CPU is restarted once, with another setting of its malloc."""

import os
import subprocess
import sys

import pytest

from parallel import allocator as heap
from tests.runs import ROOT

NO_GLIBC = pytest.mark.skipif(not heap._is_glibc(), reason="glibc only")
SETTING = "glibc.malloc.tcache_count=0"
SHOW = """
import os, sys
from parallel.allocator import restart_without_thread_cache
restart_without_thread_cache()
print(os.environ["GLIBC_TUNABLES"], os.getpid(), *sys.argv[1:])
"""


def run(program: str, *arguments: str, **environment: str) -> tuple[int, str]:
    """Its process id and what it printed."""
    env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | environment
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, env=env, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        printed = process.stdout.read().decode()
    assert process.returncode == 0
    return process.pid, printed


@NO_GLIBC
@pytest.mark.skipif(heap._has_gpu(), reason="a GPU holds the tensors")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, SETTING),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, f"glibc.malloc.hugetlb=0:{SETTING}"),
        ({"GLIBC_TUNABLES": "glibc.malloc.tcache_count=3"}, "glibc.malloc.tcache_count=3"),
    ],
)
def test_the_same_process_runs_the_same_command(given: dict[str, str], expected: str) -> None:
    pid, printed = run(SHOW, "--a", "b c", **given)
    assert printed == f"{expected} {pid} --a b c\n"


def test_a_gpu_or_another_library_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started again"))
    for glibc, gpu in ((True, True), (False, False)):
        monkeypatch.setattr(heap, "_is_glibc", lambda glibc=glibc: glibc)
        monkeypatch.setattr(heap, "_has_gpu", lambda gpu=gpu: gpu)
        heap.restart_without_thread_cache()

"""The class of the scheduler in which the process that writes checkpoints runs."""

import os
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from train.checkpoint.storage.local import LocalStorage
from train.checkpoint.storage.process import Writer


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_a_file_is_written_in_the_idle_class_until_the_rank_waits(tmp_path: Path) -> None:
    writer = Writer(LocalStorage(tmp_path), None)
    found = []

    def work(steps: int) -> Generator[None, None, str]:
        for step in range(steps):
            if step in (3, 7):
                (writer.urgent.set if step == 3 else writer.urgent.clear)()
            found.append(os.sched_getscheduler(0))
            yield
        return "written"

    assert writer._run_pieces(work(10)) == "written"
    idle, normal = os.SCHED_IDLE, os.sched_getscheduler(0)
    # the piece in which the urgency changes ends as it began
    assert found == [idle] * 4 + [normal] * 4 + [idle] * 2
    assert writer._run_pieces(work(0)) == "written"

    def broken() -> Generator[None, None, None]:
        yield
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        writer._run_pieces(broken())
    assert writer._run_pieces(work(1)) == "written", "the worker lives"

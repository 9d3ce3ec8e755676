"""The process that writes checkpoints: the class of the scheduler in which it runs, and its end."""

import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from train.checkpoint.storage import client
from train.checkpoint.storage.local import LocalStorage
from train.checkpoint.storage.messages import send
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


def test_it_ends_silently_if_its_rank_was_killed(tmp_path: Path) -> None:
    """Its reply may come before the end of its input."""
    process = subprocess.Popen(
        [sys.executable, "-c", client.PROGRAM, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin and process.stdout and process.stderr
    with process:
        process.stdout.close()
        send(process.stdin, {"call": "names", "arguments": {}})
        assert process.wait(60) == 0
        assert process.stderr.read() == b""

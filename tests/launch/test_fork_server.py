"""The process that forks ranks ends with its supervisor, also while it imports the trainer."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import ROOT, environment

SUPERVISOR = """
import os, subprocess, sys, time
server = subprocess.Popen(
    [sys.executable, "-m", "train.process.fork_server"],
    env=os.environ | {"PHALANX_SUPERVISOR": str(os.getpid())},
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
)
print(server.pid, flush=True)
time.sleep(600)
"""


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_it_ends_with_a_killed_supervisor_while_it_imports() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR], cwd=ROOT, env=environment(), stdout=subprocess.PIPE
    ) as supervisor:
        assert supervisor.stdout is not None
        server = int(supervisor.stdout.readline())
        try:
            deadline = time.monotonic() + 60
            while b"libtorch" not in Path(f"/proc/{server}/maps").read_bytes():
                assert time.monotonic() < deadline
                time.sleep(0.005)
            supervisor.kill()
            ended = time.monotonic()
            while is_alive(server) and time.monotonic() < ended + 0.5:
                time.sleep(0.005)
            assert not is_alive(server), (
                "it would import for seconds, and then find its pipe broken"
            )
        finally:
            supervisor.kill()
            if is_alive(server):
                os.kill(server, signal.SIGKILL)

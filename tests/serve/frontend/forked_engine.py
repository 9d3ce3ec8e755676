"""Engines' processes that are forks of one with torch loaded: they start in milliseconds."""

import os
import select
import signal
import socket
import subprocess
import uuid
from pathlib import Path
from typing import Any

from serve.frontend.process_handle import launch
from tests import forks
from tests.forks import Program
from tests.runs import environment

_SCRIPT = Path(__file__).with_name("child_run.py")
_START_S = 60.0


class ForkedChild:
    """What `EngineProcess` uses of `subprocess.Popen`."""

    def __init__(self, theirs: socket.socket) -> None:
        address = f"phalanx-engine-{uuid.uuid4().hex}"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("\0" + address)
            listener.listen(1)
            listener.settimeout(_START_S)
            self._program = Program([str(_SCRIPT), address], environment())
            accepted, _ = listener.accept()
            with accepted:
                socket.send_fds(accepted, [b"x"], [theirs.fileno()])
        (self.pid,) = self._program.pids
        self._descriptor = os.pidfd_open(self.pid)
        self._code: int | None = None

    def kill(self) -> None:
        self._program.signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        if self._code is None:
            poll = select.poll()
            poll.register(self._descriptor, select.POLLIN)
            if not poll.poll(None if timeout is None else 1000 * timeout):
                raise subprocess.TimeoutExpired(self._program.words, timeout or 0)
            os.close(self._descriptor)
            done = self._program.finish(10)
            self._code = done.returncode
            assert not done.stderr, done.stderr
            self._program.__exit__()
        return self._code


def launch_fork(theirs: socket.socket) -> Any:
    """A replacement of `launch`."""
    return ForkedChild(theirs) if forks.POSSIBLE else launch(theirs)

"""Processes of a server that are forks of one with their modules loaded: they start in
milliseconds."""

import os
import select
import signal
import socket
import subprocess
import uuid
from pathlib import Path
from typing import Any

from serve.frontend import process_handle
from serve.grammar import processes
from tests import forks
from tests.forks import Program
from tests.runs import environment

_SCRIPT = Path(__file__).with_name("child_run.py")
_START_S = 60.0
WORKER = ("serve.grammar.worker", "xgrammar")
"""Modules of a worker for grammars."""
launch_real_worker = processes.launch


class ForkedChild:
    """What a server uses of `subprocess.Popen`.

    program: the module whose `main` gets the descriptor of the socket `theirs`.
    """

    def __init__(
        self, theirs: socket.socket, program: str, modules: tuple[str, ...], **env: str
    ) -> None:
        address = f"phalanx-child-{uuid.uuid4().hex}"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("\0" + address)
            listener.listen(1)
            listener.settimeout(_START_S)
            words = [str(_SCRIPT), program, address]
            self._program = Program(words, environment() | env, modules)
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


def launch_engine(theirs: socket.socket) -> Any:
    """A replacement of `serve.frontend.process_handle.launch`."""
    if not forks.POSSIBLE:
        return process_handle.launch(theirs)
    return ForkedChild(theirs, "serve.frontend.process_child", forks.OURS)


def launch_worker(theirs: socket.socket) -> Any:
    """A replacement of `serve.grammar.processes.launch`."""
    if not forks.POSSIBLE:
        return launch_real_worker(theirs)
    return ForkedChild(theirs, "serve.grammar.worker", WORKER, **processes.ENVIRONMENT)

"""The rank's side of its writer process."""

import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from train.checkpoint.manifest import CheckpointError
from train.checkpoint.storage.messages import receive, send

_ROOT = str(Path(__file__).resolve().parents[3])
PROGRAM = (
    f"import sys; sys.path[0] = {_ROOT!r}\n"
    "from train.checkpoint.storage.process import main\n"
    "main(*sys.argv[1:])"
)
"""Not run as a file: its folder would come before the standard library."""


class WriterProcess:
    """Calls methods of a storage in another process, which is started at the first call, and again
    after it has ended."""

    def __init__(self, address: str, buffer: int | None = None) -> None:
        """address: where the checkpoints are. buffer: file descriptor of shared memory."""
        self._words = [sys.executable, "-c", PROGRAM, address]
        self._buffer = buffer
        self._process: subprocess.Popen[bytes] | None = None
        self._sending = threading.Lock()
        self._is_urgent = self._is_stopped = False

    def call(self, method: str, *frames: bytes, **arguments: Any) -> Any:
        """The result of a method of the storage. Raises CheckpointError if it fails, or the process
        ends."""
        if self._is_stopped:
            raise CheckpointError("the process that writes checkpoints was stopped")
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        try:
            with self._sending:
                send(process.stdin, {"call": method, "arguments": arguments}, *frames)
            message = receive(process.stdout)
        except (OSError, ValueError):  # the pipe is broken, or closed by `stop`
            message = None
        if message is None:
            raise CheckpointError(self._end(process))
        reply = message[0]
        if "error" in reply:
            raise CheckpointError(reply["error"])
        return reply["result"]

    def urgent(self, flag: bool) -> None:
        """Set whether the rank waits for the process, which then runs at normal priority."""
        self._is_urgent = flag
        if (process := self._process) is not None:
            self._send_urgent(process)

    def stop(self) -> None:
        """End the process, also within a call; later calls fail."""
        self._is_stopped = True
        if (process := self._process) is not None:
            self._end(process)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            shared = () if self._buffer is None else (self._buffer,)
            # no new session: priorities of processes are compared within one session only
            self._process = subprocess.Popen(
                [*self._words, *map(str, shared)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                pass_fds=shared, process_group=0,
            )  # fmt: skip
            if self._is_urgent:
                self._send_urgent(self._process)
        return self._process

    def _send_urgent(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        try:
            with self._sending:
                send(process.stdin, {"urgent": self._is_urgent})
        except (OSError, ValueError):  # it has ended; the next call notices
            pass

    def _end(self, process: subprocess.Popen[bytes]) -> str:
        """End the process, if it has not ended; returns how. The next call starts another one."""
        process.kill()
        code = process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(OSError):  # unsent bytes
                pipe.close()
        self._process = None
        how = f"by signal {-code}" if code < 0 else f"with code {code}"
        return f"the process that writes the checkpoint was ended {how}"

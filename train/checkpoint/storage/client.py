"""The rank's side of its writer process."""

import subprocess
import sys
import threading
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
        self._is_urgent = False

    def call(self, method: str, *frames: bytes, **arguments: Any) -> Any:
        """The result of a method of the storage. Raises CheckpointError if it fails, or the process
        ends."""
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        try:
            with self._sending:
                send(process.stdin, {"call": method, "arguments": arguments}, *frames)
            message = receive(process.stdout)
        except OSError:
            message = None
        if message is None:
            raise CheckpointError(self._ended())
        reply = message[0]
        if "error" in reply:
            raise CheckpointError(reply["error"])
        return reply["result"]

    def urgent(self, flag: bool) -> None:
        """Set whether the rank waits for the process, which then runs at normal priority."""
        self._is_urgent = flag
        if self._process is not None:
            self._send_urgent(self._process)

    def stop(self) -> None:
        """End the process, also within a call."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except OSError:  # unsent bytes
                        pass
            self._process = None

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
        except OSError:  # it has ended; the next call notices
            pass

    def _ended(self) -> str:
        """Why the process ended; the next call starts another one."""
        assert self._process is not None
        self._process.kill()
        code = self._process.wait()
        self.stop()
        how = f"by signal {-code}" if code < 0 else f"with code {code}"
        return f"the process that writes the checkpoint was ended {how}"

"""Starts ranks through `train.process.fork_server`, or as processes of their own where that is not
possible: on a host with a GPU, on another system than Linux, or for a rank with a terminal."""

import ctypes
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_ROOM = " " * 2000
"""An argument without meaning: memory for the command that `ps` shows for a rank."""
_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


class Child:
    """A started process."""

    def __init__(self, pid: int, process: subprocess.Popen[bytes] | None = None) -> None:
        """process: None for one that the server has forked."""
        self.pid, self._process = pid, process
        self.code: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self._process is not None:
            self.code = self._process.poll()
        elif self.code is None:
            self._wait(os.WNOHANG)
        return self.code

    def wait(self) -> None:
        """Wait for its end."""
        if self._process is not None:
            self.code = self._process.wait()
        elif self.code is None:
            self._wait(0)

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _wait(self, options: int) -> None:
        try:
            pid, status = os.waitpid(self.pid, options)
        except ChildProcessError:  # cannot happen to a child of ours that was not waited for
            self.code = -signal.SIGKILL
            return
        if pid:
            self.code = os.waitstatus_to_exitcode(status)


class Starter:
    """Starts ranks; keeps the server from the first rank to `close`."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None
        gpu = any(os.path.exists(driver) for driver in _GPU_DRIVERS)
        self._forks = sys.platform == "linux" and not gpu and self._reaps()

    def start(self, words: list[str], env: dict[str, str], out: Path | None, err: Path) -> Child:
        """Start `python -m WORDS`. out, err: files for its streams; None: our own."""
        if self._forks and out is not None:
            request = {"words": words, "env": env, "out": str(out), "err": str(err)}
            answer = self._ask(json.dumps(request), env)
            if answer.isdigit():
                return Child(int(answer))
        with err.open("ab") as to_err:
            to_out = None if out is None else out.open("ab")
            try:
                process = subprocess.Popen(
                    [sys.executable, "-m", *words], env=env, stdout=to_out, stderr=to_err
                )
            finally:
                if to_out is not None:
                    to_out.close()
        return Child(process.pid, process)

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            for stream in (self._server.stdin, self._server.stdout):
                if stream is not None:
                    with suppress(OSError):
                        stream.close()
            self._server = None

    def _ask(self, line: str, env: dict[str, str]) -> str:
        """The server's answer; empty if it has ended."""
        if self._server is not None and self._server.poll() is not None:
            self.close()
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "train.process.fork_server", _ROOM],
                env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
                start_new_session=True,  # Ctrl-C on the terminal is for the ranks
            )  # fmt: skip
            assert self._server.stdout is not None
            self._server.stdout.readline()
        assert self._server.stdin is not None and self._server.stdout is not None
        try:
            self._server.stdin.write(line + "\n")
            self._server.stdin.flush()
            return self._server.stdout.readline().strip()
        except OSError:
            return ""

    @staticmethod
    def _reaps() -> bool:
        """Become the parent of all descendants whose own parent ends."""
        try:
            return bool(ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)
        except (OSError, AttributeError):
            return False

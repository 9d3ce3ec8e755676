"""A function in a forked process of its own, with a time limit, that sends what it finds.

An illegal memory address ends all work of a process on its GPU, and a barrier that never completes
never returns. Here either ends one process: the results that it sent before are kept, and the
processes that it started end with it.

The process that forks must never have used a GPU: CUDA works in only one of two processes that
share its state. So even the question whether there is a GPU belongs into such a function.
"""

import contextlib
import faulthandler
import json
import os
import selectors
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Send = Callable[[dict[str, Any]], None]
"""Sends a JSON object to the process that forked this one."""
_GRACE_S = 5.0
"""Time for a killed process to end; one that waits in a driver may never do so."""
_LAST_OUTPUT = 2000
"""Characters of output that are kept of a process that failed."""


class Process:
    """A running function. `name` is for its reader."""

    def __init__(self, name: str, work: Callable[[Send], None], limit_s: float) -> None:
        self.name, self.limit_s = name, limit_s
        self.begin = time.monotonic()
        self.ended = ""
        """How it ended: empty if it returned, else the reason."""
        self.output = ""
        """The end of what it printed, if it failed."""
        self._printed = tempfile.TemporaryFile()
        self._received = b""
        self.pipe, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _run(work, writer, self._printed.fileno())
        os.close(writer)
        os.set_blocking(self.pipe, False)

    @property
    def deadline(self) -> float:
        """In seconds of `time.monotonic`."""
        return self.begin + self.limit_s

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """The objects that arrived, and whether there will be no more."""
        while True:
            try:
                part = os.read(self.pipe, 2**16)
            except BlockingIOError:
                break
            if not part:
                return self._objects(), True
            self._received += part
        return self._objects(), False

    def kill(self, reason: str) -> None:
        """End it and all processes that it started."""
        for end in (os.killpg, os.kill):  # at first it has no group of its own
            with contextlib.suppress(ProcessLookupError):
                end(self.pid, signal.SIGKILL)
        self.close(reason)

    def close(self, reason: str = "") -> None:
        """Wait for its end, and find out how it ended."""
        os.close(self.pipe)
        code = self._wait()
        if code is None:
            reason += ", and does not end when killed"
        elif not reason and code < 0:
            reason = f"killed by {signal.Signals(-code).name}"
        elif not reason and code:
            reason = f"exit code {code}"
        self.ended = reason
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # what it started
        if reason:
            self._printed.seek(max(self._printed.seek(0, os.SEEK_END) - _LAST_OUTPUT, 0))
            self.output = self._printed.read().decode(errors="replace").strip()
        self._printed.close()

    def _wait(self) -> int | None:
        """Its exit code, or the negative number of the signal that ended it."""
        end = time.monotonic() + _GRACE_S
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > end:
                return None
            time.sleep(0.005)

    def _objects(self) -> list[dict[str, Any]]:
        *lines, self._received = self._received.split(b"\n")
        return [json.loads(line) for line in lines]


def _run(work: Callable[[Send], None], writer: int, printed: int) -> None:
    """The forked process, which never returns."""
    code = 1
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
        if faulthandler.is_enabled():
            faulthandler.enable(sys.stderr)

        def send(value: dict[str, Any]) -> None:
            left = memoryview(json.dumps(value).encode() + b"\n")
            while left:
                left = left[os.write(writer, left) :]

        try:
            work(send)
            code = 0
        except BaseException as error:  # every reason is sent
            traceback.print_exc()
            text = str(error).strip().splitlines() or [""]
            send({"error": f"{type(error).__name__}: {text[0][:300]}"})
    finally:
        os._exit(code)


def run_all(
    tasks: Iterable[tuple[str, Callable[[Send], None], float]], at_once: int,
    stopped: Callable[[], str],
) -> Iterator[tuple[Process, dict[str, Any] | None]]:  # fmt: skip
    """Run functions, some at a time; yields what they send as it arrives, then None at their end.

    tasks: name, function and time limit in seconds, read when there is room for one.
    stopped: a reason to end all processes and to start no further one; empty: none.
    """
    waiting, running = iter(tasks), dict[int, Process]()
    with selectors.DefaultSelector() as selector:
        try:
            while True:
                reason = stopped()
                while not reason and len(running) < at_once and (task := next(waiting, None)):
                    process = Process(*task)
                    running[process.pipe] = process
                    selector.register(process.pipe, selectors.EVENT_READ)
                if not running:
                    return
                for pipe in [key.fd for key, _ in selector.select(0.2)]:
                    process = running[pipe]
                    objects, is_last = process.read()
                    if is_last:
                        selector.unregister(pipe)
                        process.close()
                        del running[pipe]
                    for value in objects:
                        yield process, value
                    if is_last:
                        yield process, None
                now = time.monotonic()
                for pipe, process in [*running.items()]:
                    late = f"stopped after {process.limit_s:.0f} s, its time limit"
                    if reason or now > process.deadline:
                        selector.unregister(pipe)
                        del running[pipe]
                        process.kill(reason or late)
                        yield process, None
        finally:
            for process in running.values():
                process.kill("stopped")

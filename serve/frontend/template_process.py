"""Renders a chat template in a process of its own, which starts with the first use.

A template is an untrusted program. Filters and operators can pad, repeat and join texts in many
ways, so its memory is limited by the kernel instead of by a list of operations; and it does not
hold the interpreter lock of the engine. See `serve.frontend.template_child`.
"""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PROGRAM = Path(__file__).with_name("template_child.py")


class TemplateFailed(Exception):
    """The template has an error, refuses its variables, or exceeds a limit."""


class TemplateProcess:
    """One template. Threads may use it at the same time; it renders for one after another."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = lambda: None

    def render(self, variables: dict[str, Any]) -> str:
        """Raises TemplateFailed. variables: as in JSON."""
        try:
            line = json.dumps(variables)
        except (TypeError, ValueError, RecursionError):
            raise TemplateFailed("its variables are not JSON values") from None
        with self._lock:
            self._start()
            return self._exchange(line)

    def start(self) -> None:
        """Start the process now. Raises TemplateFailed if the source is not a template."""
        with self._lock:
            self._start()

    def close(self) -> None:
        """End the process; it starts again with the next use."""
        with self._lock:
            self._close()

    def _start(self) -> None:
        if self._process is not None:
            if self._process.poll() is None:
                return
            self._close()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the parent only
            )
        except OSError as error:
            raise TemplateFailed(f"its process does not start: {error}") from None
        self._end = weakref.finalize(self, _kill, self._process)
        try:
            self._exchange(json.dumps(self._source))
        except TemplateFailed:
            self._close()
            raise

    def _close(self) -> None:
        self._process = None
        self._end()

    def _exchange(self, line: str) -> str:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()
            found = process.stdout.readline()
        except BrokenPipeError:
            found = b""
        if not found.endswith(b"\n"):
            self._close()
            if process.returncode == -signal.SIGPROF:
                raise TemplateFailed("it takes too long")
            raise TemplateFailed("its process ended; it may need too much memory")
        answer = json.loads(found)
        if "error" in answer:
            raise TemplateFailed(answer["error"])
        return str(answer["text"])


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process that may have ended itself, whose return code is then its own."""
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with contextlib.suppress(OSError):  # it did not read everything
            pipe.close()
    try:
        process.wait(0.1)  # it ends with its input
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

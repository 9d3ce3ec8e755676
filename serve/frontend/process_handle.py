"""The process of an engine, from the server's side: its start, its end, what is sent to it."""

import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from configs.errors import UserError
from serve.cache.prefix_cache import token_key
from serve.engine.input_processor import EngineInfo
from serve.engine.request import Request
from serve.frontend.process_messages import (
    CompiledGrammar,
    Connection,
    FromEngine,
    NewRequest,
    Ready,
    Refused,
    Submit,
)

_ROOT = Path(__file__).resolve().parent.parent.parent
_EXIT_SECONDS = 5.0
"""After its connection is closed."""

Launch = Callable[[socket.socket], "subprocess.Popen[bytes]"]


def launch(theirs: socket.socket) -> "subprocess.Popen[bytes]":
    """Start a process that serves the other end of `theirs`."""
    return subprocess.Popen(
        [sys.executable, "-m", "serve.frontend.process_child", str(theirs.fileno())],
        cwd=_ROOT,
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        start_new_session=True,  # Ctrl-C is for this process only
    )


class ProcessHandle:
    """One process and its connection."""

    def __init__(self, launched: Launch) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.popen = launched(theirs)
        self.connection = Connection(ours, FromEngine)
        self._queue: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=self._write, name="to engine", daemon=True).start()

    def send(self, message: Any) -> None:
        """Return at once; a process that has ended gets nothing."""
        self._queue.put(message)

    def wait_until_ready(self) -> EngineInfo:
        """Raises UserError if it refuses to start, EOFError if it ends."""
        message = self.connection.receive()
        if isinstance(message, Refused):
            raise UserError(message.message)
        assert isinstance(message, Ready)
        return message.info

    def end(self) -> int:
        """Kill it if it has not ended; returns its exit code, negative for a signal."""
        self._queue.put(None)
        self.connection.socket.close()
        with suppress(subprocess.TimeoutExpired):
            return self.popen.wait(_EXIT_SECONDS)  # it has closed its end, and exits
        self.popen.kill()
        return self.popen.wait()

    def _write(self) -> None:
        with suppress(OSError):  # it has ended
            while (message := self._queue.get()) is not None:
                self.connection.send(message)


def submission(numbers: Sequence[int], requests: Sequence[Request]) -> Submit:
    """The message of requests. Choices of a prompt share it."""
    prompts: dict[int, int] = {}
    groups: dict[int, int] = {}
    keys: list[bytes] = []
    made = []
    for number, request in zip(numbers, requests, strict=True):
        if id(request.prompt) not in prompts:
            prompts[id(request.prompt)] = len(keys)
            keys.append(token_key(request.prompt))
        group = groups.setdefault(id(request.group), len(groups))
        grammar = None
        if request.grammar is not None:
            own = request.grammar.grammar
            grammar = CompiledGrammar(own.number, own.compiled, own.is_json)
        prompt = prompts[id(request.prompt)]
        made.append(NewRequest(number, prompt, request.params, request.priority, group, grammar))
    return Submit(keys, made)

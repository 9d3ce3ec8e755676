"""Starts the worker of an engine (`serve.grammar.worker`), and connects to its children."""

import importlib.util
import os
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from serve.grammar.limits import GrammarError
from serve.grammar.messages import send

if TYPE_CHECKING:
    from tokenizers import Tokenizer

COMPILE, MATCH = b"c", b"m"
"""What a child of the worker does."""
READY = b"r"
"""The worker and its children send this first."""
_START_SECONDS = 300.0
"""It loads torch and xgrammar: seconds of processor time, minutes on a busy machine."""
_FORK_SECONDS = 60.0
_ROOT = Path(__file__).resolve().parent.parent.parent
_INSTALL = 'structured output needs xgrammar: pip install "xgrammar>=0.2.8,<0.3"'
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
               "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
"""Of a worker: a process with several threads cannot be forked safely."""


def launch(theirs: socket.socket) -> subprocess.Popen[bytes]:
    """Start a worker. theirs: its end of the connection to the engine."""
    return subprocess.Popen(
        [sys.executable, "-m", "serve.grammar.worker", str(theirs.fileno())],
        cwd=_ROOT,
        env=os.environ | ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
    )


class GrammarWorker:
    """The worker for one tokenizer; it starts with the first connection. Any thread may call it.

    end_tokens: of the model. n_tokens: that may be sampled.
    """

    def __init__(self, tokenizer: "Tokenizer", end_tokens: frozenset[int], n_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.end_tokens = end_tokens
        self.n_tokens = n_tokens
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._closed = False

    def connect(self, kind: bytes) -> socket.socket:
        """A connection to a new child. Raises GrammarError: 503 if there is none, 400 if the
        library is not installed."""
        for _ in range(2):  # a worker that was killed is started again
            with self._lock:
                control = self._started()
                ours, theirs = _pair()
                with theirs, suppress(OSError):
                    socket.send_fds(control, [kind], [theirs.fileno()])
            ours.settimeout(_FORK_SECONDS)
            with suppress(OSError):
                if ours.recv(1) == READY:
                    return ours
            ours.close()
            with self._lock:
                if self._control is control:
                    self._stop()
        raise _not_started()

    def start(self) -> None:
        """Start it now, and wait for it. Raises GrammarError as `connect`."""
        with self._lock:
            self._started()

    def close(self) -> None:
        """End the process."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()  # a start that waits for it ends
        with self._lock:
            self._stop()

    def _started(self) -> socket.socket:
        if self._closed:
            raise GrammarError("the server is shutting down", 503)
        if self._control is not None:
            return self._control
        if importlib.util.find_spec("xgrammar") is None:
            raise GrammarError(_INSTALL)
        control, theirs = _pair()
        with theirs:
            try:
                self._process = launch(theirs)
            except OSError as error:
                control.close()
                raise _not_started(error) from None
        self._control = control
        tokenizer = self.tokenizer.to_str().encode()
        control.settimeout(_START_SECONDS)
        is_ready = False
        with suppress(OSError):
            send(control, [sorted(self.end_tokens), self.n_tokens], tokenizer)
            is_ready = control.recv(1) == READY  # what follows is no part of this message
        if not is_ready:
            self._stop()
            raise _not_started()
        return control

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            self._process.kill()  # its children end when their connections are closed
            self._process.wait()
            self._process = None


def _pair() -> tuple[socket.socket, socket.socket]:
    try:
        return socket.socketpair()
    except OSError as error:  # too many open files
        raise _not_started(error) from None


def _not_started(error: OSError | None = None) -> GrammarError:
    reason = f": {error.strerror}" if error is not None else ""
    return GrammarError(f"the process of the grammars does not start{reason}", 503)

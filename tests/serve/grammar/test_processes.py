"""The worker of grammars: slow starts, ends, and a server that stops meanwhile."""

import socket
import threading
import time
from typing import Any

import pytest
from tokenizers import Tokenizer

from serve.grammar import processes
from serve.grammar.limits import GrammarError
from serve.grammar.messages import receive
from serve.grammar.processes import COMPILE, READY, GrammarWorker


class FakeProcess:
    """A worker that reads what it gets, and is ready when `go_on` is set."""

    def __init__(self, theirs: socket.socket, go_on: threading.Event) -> None:
        self.connection = socket.socket(fileno=socket.dup(theirs.fileno()))
        self.go_on = go_on
        self.after = b""
        """What came after the first message before it was ready."""
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        receive(self.connection)
        self.go_on.wait(30)
        self.connection.setblocking(False)
        try:
            self.after = self.connection.recv(100)
        except BlockingIOError:
            self.connection.setblocking(True)
            self.connection.sendall(READY)
        except OSError:
            pass

    def kill(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)
        self.go_on.set()

    def wait(self) -> int:
        self._thread.join(30)
        self.connection.close()
        return -9


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, go_on: threading.Event) -> list[FakeProcess]:
    made: list[FakeProcess] = []

    def launch(theirs: socket.socket) -> Any:
        made.append(FakeProcess(theirs, go_on))
        return made[-1]

    monkeypatch.setattr(processes, "launch", launch)
    return made


@pytest.fixture
def go_on() -> threading.Event:
    return threading.Event()


def test_a_worker_that_is_not_ready_gets_nothing_more(
    started: list[FakeProcess], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It read a connection's first byte as a part of the tokenizer."""
    monkeypatch.setattr(processes, "_START_SECONDS", 0.1)
    worker = GrammarWorker(tokenizer, frozenset(), 300)
    with pytest.raises(GrammarError, match="does not start") as caught:
        worker.connect(COMPILE)
    assert caught.value.status == 503
    assert len(started) == 1 and not started[0].after
    worker.close()


def test_a_stop_does_not_wait_for_a_worker_that_starts(
    started: list[FakeProcess], tokenizer: Tokenizer
) -> None:
    worker = GrammarWorker(tokenizer, frozenset(), 300)
    errors: list[GrammarError] = []

    def start() -> None:
        try:
            worker.start()
        except GrammarError as error:
            errors.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    while not started:
        time.sleep(0.001)
    begin = time.monotonic()
    worker.close()
    thread.join(30)
    assert time.monotonic() - begin < 10 and len(errors) == 1
    with pytest.raises(GrammarError, match="shutting down"):
        worker.start()


def test_a_machine_without_descriptors_is_an_error_of_the_machine(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(theirs: socket.socket) -> Any:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(processes, "launch", launch)
    worker = GrammarWorker(tokenizer, frozenset(), 300)
    for _ in range(2):
        with pytest.raises(GrammarError, match="Too many open files") as caught:
            worker.connect(COMPILE)
        assert caught.value.status == 503
    worker.close()

"""The program of an engine's process, without another process."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from serve.engine.core import EngineCore
from serve.engine.sampling_params import SamplingParams
from serve.frontend.process_child import Child
from serve.frontend.process_messages import (
    CompiledGrammar,
    Connection,
    FromEngine,
    FromServer,
    NewRequest,
    Outputs,
    Submit,
)

LIVENESS_S = 60.0


@pytest.fixture
def child(make_core: Callable[..., EngineCore]) -> Iterator[tuple[Child, Connection]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        made = Child(Connection(theirs, FromServer), make_core())
        made.thread.start()
        yield made, Connection(ours, FromEngine)
        made.thread.stop()


def submission(number: int, grammar: CompiledGrammar | None = None) -> Submit:
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    tokens = b"".join(token.to_bytes(4, "little") for token in (5, 6, 7))
    return Submit([tokens], [NewRequest(number, 0, params, 0, 0, grammar)])


def wait_until(found: Callable[[], Any]) -> None:
    deadline = time.monotonic() + LIVENESS_S
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_the_engine_does_not_wait_for_the_worker_of_grammars(
    child: tuple[Child, Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It loads xgrammar for seconds: streams stood still at the first request with a grammar."""
    made, server = child
    assert made.core.grammars is not None
    begun, go_on = threading.Event(), threading.Event()

    def start() -> None:
        begun.set()
        assert go_on.wait(LIVENESS_S)

    monkeypatch.setattr(made.core.grammars.worker, "start", start)
    queued: list[int] = []
    submit = made.thread.submit

    def record(requests: Any, deliver: Any, limited: bool = True) -> None:
        queued.extend(made._numbers[request] for request in requests)
        if requests[0].grammar is None:
            submit(requests, deliver, limited)

    monkeypatch.setattr(made.thread, "submit", record)
    for number in (1, 2):
        made._submit(submission(number, CompiledGrammar(number, b"", False)))
    assert begun.wait(LIVENESS_S)
    made._submit(submission(3))
    outputs: list[Any] = []
    while not outputs or outputs[-1].finish_reason is None:
        message = server.receive()
        assert isinstance(message, Outputs)
        outputs += message.outputs
    assert {output.number for output in outputs} == {3}
    assert queued == [3]
    made._cancel([1])  # it is not queued any more
    go_on.set()
    wait_until(lambda: 2 in queued)
    made._submit(submission(4, CompiledGrammar(2, b"", False)))  # the worker has started
    assert queued == [3, 2, 4]
    made._cancel([2, 4])
    assert not (made._requests or made._numbers)

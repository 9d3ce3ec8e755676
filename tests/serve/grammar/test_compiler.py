"""The cache of compiled grammars has bounds in count and bytes."""

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from serve.grammar import compiler, messages
from serve.grammar.compiler import GrammarCompiler
from serve.grammar.limits import N_COMPILING, GrammarError
from serve.grammar.matcher import Grammar
from serve.grammar.spec import GrammarSpec


class Compiler(GrammarCompiler):
    """Grammars of as many bytes as their text has characters."""

    def __init__(self) -> None:
        super().__init__(None, frozenset(), 8)  # type: ignore[arg-type]
        self.compiled: list[str] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def _compile(self, spec: GrammarSpec) -> Grammar:
        self.compiled.append(spec.text)
        self.go_on.wait(30)
        if spec.text.startswith("bad"):
            raise GrammarError("bad", 400 if spec.text == "bad" else 503)
        return Grammar(0, spec.text.encode(), False, 8)


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    monkeypatch.setattr(compiler, "MAX_CACHED", 3)
    monkeypatch.setattr(compiler, "MAX_CACHED_BYTES", 10)
    made = Compiler()
    yield made
    made.close()


def ask(made: Compiler, *texts: str) -> None:
    for text in texts:
        done: Future[Grammar] = made.compile(GrammarSpec("regex", text))
        done.exception()
        while made._n_compiling:  # its thread updates the cache after that
            time.sleep(0.001)


def test_bounds(compiling: Compiler) -> None:
    ask(compiling, "a", "b", "c", "a", "d", "a", "b")
    assert compiling.compiled == ["a", "b", "c", "d", "b"], "the least recently used is removed"
    compiling.compiled.clear()
    ask(compiling, "1234567890", "a")
    assert compiling.compiled == ["1234567890", "a"], "ten bytes leave no room for others"


def test_refusals_are_kept_and_failures_are_not(compiling: Compiler) -> None:
    ask(compiling, "bad", "bad", "bad machine", "bad machine")
    assert compiling.compiled == ["bad", "bad machine", "bad machine"]
    assert compiling.n_cached == 1


def test_what_waits_too_long_is_given_up(
    compiling: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "QUEUE_SECONDS", 0.05)
    compiling.go_on.clear()
    first = [compiling.compile(GrammarSpec("regex", str(n))) for n in range(N_COMPILING)]
    while len(compiling.compiled) < N_COMPILING:
        time.sleep(0.001)
    late = compiling.compile(GrammarSpec("regex", "late"))
    time.sleep(0.1)
    compiling.go_on.set()
    error = late.exception()
    assert isinstance(error, GrammarError) and error.status == 503
    assert all(one.exception() is None for one in first)
    ask(compiling, "late")
    assert compiling.compiled[-1] == "late", "it is not cached"


def test_a_process_that_is_killed_once_is_tried_again() -> None:
    made = GrammarCompiler(None, frozenset(), 8)  # type: ignore[arg-type]
    connections = 0

    def connect(kind: bytes) -> socket.socket:
        nonlocal connections
        connections += 1
        ours, theirs = socket.socketpair()
        if connections > 1:
            messages.send(theirs, {}, b"\ncompiled")
            made.theirs = theirs  # type: ignore[attr-defined]
        else:
            theirs.close()
        return ours

    made.worker.connect = connect  # type: ignore[method-assign]
    assert made.compile(GrammarSpec("regex", "a")).result().compiled == b"\ncompiled"
    assert connections == 2
    made.close()
    made.theirs.close()  # type: ignore[attr-defined]

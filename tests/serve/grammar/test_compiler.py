"""The cache of compiled grammars has bounds in count and bytes."""

import time
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from serve.grammar import compiler
from serve.grammar.compiler import GrammarCompiler
from serve.grammar.limits import GrammarError
from serve.grammar.matcher import Grammar
from serve.grammar.spec import GrammarSpec


class Compiler(GrammarCompiler):
    """Grammars of as many bytes as their text has characters."""

    def __init__(self) -> None:
        super().__init__(None, frozenset(), 8)  # type: ignore[arg-type]
        self.compiled: list[str] = []

    def _compile(self, spec: GrammarSpec) -> Grammar:
        self.compiled.append(spec.text)
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

"""What a step of the engine does with the grammars of its requests.

What may follow an output is computed by another process while the forward pass runs, so a step
waits for it only before it samples. Two things are known one pass too late then. A forced token is
sampled from logits that are not needed, and the ones after it are appended without a pass as usual.
An output that turns out to be complete ends without the token of the pass. So where this is likely
(`Grammar.eager`), or the output's last token decides on its finish reason, the step waits after
sampling instead.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from serve.grammar.compiler import GrammarCompiler
from serve.grammar.matcher import GrammarState

_Plan = TypeVar("_Plan")


class Constrained(Protocol):
    """A request, as far as its grammar is concerned."""

    grammar: GrammarState | None

    @property
    def budget(self) -> int: ...
    def accept(self, token: int | None, end_tokens: frozenset[int]) -> bool: ...


class _Sampled(Protocol):
    @property
    def request(self) -> Any: ...


_Request = TypeVar("_Request", bound=Constrained)
_Chunk = TypeVar("_Chunk", bound=_Sampled)


class GrammarSteps:
    """compiler: None if the model has no tokenizer, so no request has a grammar."""

    def __init__(self, compiler: GrammarCompiler | None) -> None:
        self._compiler = compiler

    def begin(
        self, sampled: Sequence[_Chunk], plan: Callable[[Sequence[_Chunk]], _Plan]
    ) -> Callable[[], _Plan] | None:
        """Start to compute what may follow the outputs of the requests that a step samples.

        plan: prepares their sampling, which needs it. Returns a function that waits for it, and
        then calls `plan`; None if nothing is sampled.
        """
        if not sampled:
            return None
        matchers = None if self._compiler is None else self._compiler.matchers
        states = [c.request.grammar for c in sampled if c.request.grammar is not None]
        if matchers is not None and states:
            matchers.begin(states)

        def prepare() -> _Plan:
            if matchers is not None and states:
                matchers.finish()
            return plan(sampled)

        return prepare

    def accept(
        self, tokens: Mapping[_Request, tuple[int | None, object]], end_tokens: frozenset[int]
    ) -> set[_Request]:
        """Continue the grammars of requests after their sampled tokens. Returns those that were
        complete before that: their tokens are not part of the output."""
        complete: set[_Request] = set()
        eager: list[GrammarState] = []
        for request, (token, _) in tokens.items():
            grammar = request.grammar
            if grammar is not None and grammar.finished:
                complete.add(request)
            elif request.accept(token, end_tokens) and grammar is not None:
                if token in grammar.grammar.eager or request.budget <= 0:
                    eager.append(grammar)
        if eager and self._compiler is not None:
            self._compiler.matchers.update(eager)
        return complete

"""The engine's side of matching: what may follow each output.

The matchers are in another process (`serve.grammar.matching`), since no limit can stop a library
that computes too long in a thread. A step exchanges one message with it for all requests. If the
process is lost, a new one gets the tokens of the requests again, one by one; a request with which
it is lost again ends with an error, and the others continue.
"""

import itertools
import logging
import socket
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from serve.grammar.limits import MATCH_SECONDS, GrammarError
from serve.grammar.mask import only
from serve.grammar.messages import receive, send
from serve.grammar.processes import MATCH, GrammarWorker

log = logging.getLogger("serve")


class Grammar:
    """A compiled grammar. number: its name in messages. compiled: as xgrammar serializes it."""

    def __init__(self, number: int, compiled: bytes, is_json: bool, n_tokens: int) -> None:
        self.number = number
        self.compiled = compiled
        self.is_json = is_json
        self.n_tokens = n_tokens


class GrammarState:
    """What a grammar allows after the tokens of one output.

    The process is ahead of the output by the forced tokens; the mask of each is that token.
    """

    _numbers = itertools.count()

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar
        self.number = next(self._numbers)
        self.tokens: list[int] = []
        self.forced: deque[int] = deque()
        """The next tokens, if they are known."""
        self.error: str | None = None
        self.n_matched = 0
        """Tokens that the process has, forced ones included."""
        self._finished = False
        self._mask: NDArray[np.int32] | None = None

    @property
    def is_current(self) -> bool:
        """Whether the mask is known."""
        return bool(self.forced) or self._finished or self._mask is not None

    @property
    def finished(self) -> bool:
        """Whether the output is complete: nothing can follow."""
        return self._finished and not self.forced

    @property
    def mask(self) -> NDArray[np.int32] | None:
        """`[words]`: the tokens that may be next; None if it is not known."""
        if self.forced:
            return only(self.forced[0], self.grammar.n_tokens)
        return self._mask

    def allows_others(self, tokens: frozenset[int]) -> bool:
        """Whether the mask allows a token that is not one of `tokens`."""
        mask = self.mask
        if mask is None:
            return True
        left = mask.view(np.uint32).copy()
        for token in tokens:
            if token < self.grammar.n_tokens:
                left[token // 32] &= ~np.uint32(1 << (token % 32))
        return bool(left.any())

    def accept(self, token: int) -> None:
        """Continue after `token`, which the mask allows."""
        self.tokens.append(token)
        if self.forced:
            assert self.forced.popleft() == token, "the grammar allows another token"
        else:
            self._mask = None

    def update(self, forced: Sequence[int], finished: bool, mask: bytes) -> None:
        """Take what the process has computed for `tokens`."""
        self.forced.extend(forced)
        self.n_matched = len(self.tokens) + len(forced)
        self._finished = finished
        self._mask = np.frombuffer(mask, np.int32)


class Matchers:
    """The matchers of an engine. Only the engine's thread calls `update`."""

    def __init__(self, worker: GrammarWorker) -> None:
        self.worker = worker
        self._connection: socket.socket | None = None
        self._states: WeakSet[GrammarState] = WeakSet()
        """Those that the process has, and `_started` their numbers."""
        self._started: set[int] = set()
        self._grammars: WeakSet[Grammar] = WeakSet()
        self._loaded: set[int] = set()

    def update(self, states: Sequence[GrammarState]) -> None:
        """Compute the masks of states that have none; those that fail get an error."""
        todo = [state for state in states if not state.is_current and state.error is None]
        if not todo:
            return
        try:
            self._exchange(todo)
        except GrammarError as error:  # it does not start
            for state in todo:
                state.error = str(error)
        except (EOFError, OSError):  # one of them may be the reason: each alone
            log.warning("the process that matches grammars is lost; it is started again")
            self.close()
            for state in todo:
                try:
                    self._exchange([state])
                except (EOFError, OSError, GrammarError):
                    state.error = "its grammar takes too long to match"
                    self.close()

    def close(self) -> None:
        """End the process."""
        if self._connection is not None:
            with suppress(OSError):
                self._connection.close()
        self._connection = None
        self._started.clear()
        self._loaded.clear()
        self._states.clear()
        self._grammars.clear()

    def _connected(self) -> socket.socket:
        if self._connection is None:
            self._connection = self.worker.connect(MATCH)
            self._connection.settimeout(MATCH_SECONDS)
        return self._connection

    def _exchange(self, todo: Sequence[GrammarState]) -> None:
        """Send the new tokens of states, all of them if the process does not have the state, and
        take what it computes."""
        connection = self._connected()
        dropped: set[int] = set()
        ended: set[int] = set()
        if len(self._states) != len(self._started):  # some were deleted
            dropped = self._loaded - {grammar.number for grammar in self._grammars}
            ended = self._started - {state.number for state in self._states}
            self._loaded -= dropped
            self._started -= ended
        items, bodies = [], []
        for state in todo:
            grammar, body = state.grammar, b""
            if grammar.number not in self._loaded:
                body = grammar.compiled
                self._loaded.add(grammar.number)
                self._grammars.add(grammar)
            known = state.number in self._started
            tokens = state.tokens[state.n_matched if known else 0 :]
            self._started.add(state.number)
            self._states.add(state)
            bodies.append(body)
            items.append([state.number, grammar.number, grammar.is_json, len(body), tokens])
        send(connection, [[*dropped], [*ended], items], b"".join(bodies))
        contents, masks = receive(connection)
        n_bytes = len(masks) // len(todo)
        for n, (state, (forced, finished, error)) in enumerate(zip(todo, contents, strict=True)):
            state.error = error
            state.update(forced, finished, masks[n * n_bytes : (n + 1) * n_bytes])

"""The engine's side of matching: what may follow each output.

The matchers are in another process (`serve.grammar.matching`), since no limit can stop a library
that computes too long in a thread. A step exchanges one message with it for all requests: `begin`
sends the tokens, `finish` takes what may follow, and the forward pass is between the two. If the
process is lost, a new one gets the tokens of the requests again, one by one; a request with which
it is lost again ends with an error, and the others continue.

What is forced after a token is known one pass too late then: the pass computes logits that are not
needed. So for tokens after which this has happened (`Grammar.eager`) the engine calls `update`,
which waits, before the next pass.
"""

import itertools
import logging
import mmap
import os
import socket
import struct
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from serve.grammar.limits import MATCH_SECONDS, GrammarError
from serve.grammar.mask import n_words, only
from serve.grammar.messages import FAILED, FINISHED, MAX_ITEMS, receive_numbers, send_numbers
from serve.grammar.processes import MATCH, GrammarWorker

log = logging.getLogger("serve")
_TIMEOUT = struct.pack("ll", MATCH_SECONDS, 0)


class Grammar:
    """A compiled grammar. number: its name in messages. compiled: with what `matching` needs."""

    def __init__(self, number: int, compiled: bytes, is_json: bool, n_tokens: int) -> None:
        self.number = number
        self.compiled = compiled
        self.is_json = is_json
        self.n_tokens = n_tokens
        self.eager: set[int] = set()
        """Tokens after which the next ones were forced, or the output was complete."""


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

    def update(self, forced: Sequence[int], finished: bool, mask: NDArray[np.int32]) -> None:
        """Take what the process has computed for `tokens`. mask: is copied."""
        if self.tokens and (forced or finished):
            self.grammar.eager.add(self.tokens[-1])
        self.forced.extend(forced)
        self.n_matched = len(self.tokens) + len(forced)
        self._finished = finished
        self._mask = mask.copy()


class Matchers:
    """The matchers of an engine. Only the engine's thread calls `begin`, `finish` and `update`."""

    def __init__(self, worker: GrammarWorker) -> None:
        self.worker = worker
        self._connection: socket.socket | None = None
        self._masks: NDArray[np.int32] = np.zeros((0, 0), np.int32)
        """`[items of a message, words]`, in memory that the process writes."""
        self._states: WeakSet[GrammarState] = WeakSet()
        """Those that the process has, and `_started` their numbers."""
        self._started: set[int] = set()
        self._grammars: WeakSet[Grammar] = WeakSet()
        self._loaded: set[int] = set()
        self._asked: list[GrammarState] = []
        """Of the message that is not answered yet."""
        self._lost: list[GrammarState] = []
        """Of a message that could not be sent."""

    def update(self, states: Sequence[GrammarState]) -> None:
        """Compute the masks of states that have none; those that fail get an error."""
        self.begin(states)
        self.finish()

    def begin(self, states: Sequence[GrammarState]) -> None:
        """Start to compute the masks of states that have none."""
        self.finish()
        todo = [state for state in states if not state.is_current and state.error is None]
        while len(todo) > MAX_ITEMS:
            self.update(todo[:MAX_ITEMS])
            todo = todo[MAX_ITEMS:]
        if todo:
            self._asked = todo
            try:
                self._send(todo)
            except GrammarError as error:  # it does not start
                self._asked = []
                for state in todo:
                    state.error = str(error)
            except OSError:
                self._asked, self._lost = [], todo

    def finish(self) -> None:
        """Wait for what `begin` has started."""
        lost, self._lost = self._lost, []
        asked, self._asked = self._asked, []
        try:
            if asked:
                self._receive(asked)
        except (EOFError, OSError):
            lost = asked
        if lost:  # one of them may be the reason: each alone
            log.warning("the process that matches grammars is lost; it is started again")
            self.close()
        for state in lost:
            try:
                self._send([state])
                self._receive([state])
            except (EOFError, OSError, GrammarError):
                state.error = "its grammar takes too long to match"
                self.close()

    def close(self) -> None:
        """End the process."""
        if self._connection is not None:
            with suppress(OSError):
                self._connection.close()
        self._connection = None
        self._asked, self._lost = [], []
        self._started.clear()
        self._loaded.clear()
        self._states.clear()
        self._grammars.clear()

    def _connected(self, n_tokens: int) -> socket.socket:
        if self._connection is None:
            connection = self.worker.connect(MATCH)
            connection.settimeout(None)
            # the kernel's timeout: with the one of Python every call is two
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEOUT)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEOUT)
            width = n_words(n_tokens)
            file = os.memfd_create("masks")
            try:
                os.ftruncate(file, MAX_ITEMS * width * 4)
                shared = mmap.mmap(file, 0)
                socket.send_fds(connection, [b"m"], [file])
            finally:
                os.close(file)
            self._masks = np.frombuffer(shared, np.int32).reshape(MAX_ITEMS, width)
            self._connection = connection
        return self._connection

    def _send(self, todo: Sequence[GrammarState]) -> None:
        """Send the new tokens of states, all of them if the process does not have the state."""
        connection = self._connected(todo[0].grammar.n_tokens)
        dropped: set[int] = set()
        ended: set[int] = set()
        if len(self._states) != len(self._started):  # some were deleted
            dropped = self._loaded - {grammar.number for grammar in self._grammars}
            ended = self._started - {state.number for state in self._states}
            self._loaded -= dropped
            self._started -= ended
        numbers, bodies = [len(dropped), *dropped, len(ended), *ended, len(todo)], []
        for state in todo:
            grammar, n_known = state.grammar, state.n_matched
            n_compiled = 0
            if grammar.number not in self._loaded:
                n_compiled = len(grammar.compiled)
                bodies.append(grammar.compiled)
                self._loaded.add(grammar.number)
                self._grammars.add(grammar)
            if state.number not in self._started:
                n_known = 0
                self._started.add(state.number)
                self._states.add(state)
            tokens = state.tokens[n_known:]
            numbers += state.number, grammar.number, grammar.is_json, n_compiled, len(tokens)
            numbers += tokens
        send_numbers(connection, numbers, b"".join(bodies))

    def _receive(self, asked: Sequence[GrammarState]) -> None:
        """Take what the process has computed: for each state its status and the number of forced
        tokens, which follow, or of bytes of an error."""
        assert self._connection is not None
        numbers, errors = receive_numbers(self._connection)
        at = 0
        for state, mask in zip(asked, self._masks, strict=False):
            status, n = numbers[at : at + 2]
            at += 2
            if status == FAILED:
                state.error = errors[:n].decode(errors="replace")
                errors = errors[n:]
                continue
            state.update(numbers[at : at + n], status == FINISHED, mask)
            at += n

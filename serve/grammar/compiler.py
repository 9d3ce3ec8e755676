"""Compiles grammars in other processes and caches them, with bounds in count and bytes.

`compile` returns at once; a few threads wait for the processes, so no thread of the engine or of
HTTP does. Requests for the same grammar share one compilation, and a cached grammar waits for no
other. Refusals are cached, too: a hostile grammar costs its time limit once.
"""

import itertools
import socket
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

from serve.grammar.limits import (
    COMPILE_CPU_SECONDS,
    COMPILE_SECONDS,
    MAX_CACHED,
    MAX_CACHED_BYTES,
    MAX_COMPILING,
    N_COMPILING,
    QUEUE_SECONDS,
    GrammarError,
)
from serve.grammar.matcher import Grammar, Matchers
from serve.grammar.messages import receive, send
from serve.grammar.processes import COMPILE, GrammarWorker
from serve.grammar.spec import GrammarSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class GrammarCompiler:
    """Grammars for one tokenizer. end_tokens: of the model. n_tokens: that may be sampled."""

    def __init__(self, tokenizer: "Tokenizer", end_tokens: frozenset[int], n_tokens: int) -> None:
        self.worker = GrammarWorker(tokenizer, end_tokens, n_tokens)
        self.matchers = Matchers(self.worker)
        self.n_compiled = 0
        """Grammars compiled or refused; `n_cached` more requests found theirs in the cache."""
        self.n_cached = 0
        self._n_tokens = n_tokens
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._cache: OrderedDict[GrammarSpec, Future[Grammar]] = OrderedDict()
        self._n_compiling = 0
        self._sizes: dict[GrammarSpec, int] = {}
        """Bytes of those that are compiled or refused."""
        self._pool = ThreadPoolExecutor(N_COMPILING, "grammars")
        self._connections: set[socket.socket] = set()

    def compile(self, spec: GrammarSpec) -> Future[Grammar]:
        """The compiled grammar, later; or GrammarError for one that is wrong or beyond the limits.
        Raises GrammarError (429) if too many are waiting."""
        with self._lock:
            found = self._cache.get(spec)
            if found is not None:
                self.n_cached += 1
                self._cache.move_to_end(spec)
                return found
            if self._n_compiling >= MAX_COMPILING:
                raise GrammarError("too many grammars are being compiled; try again later", 429)
            self._n_compiling += 1
            self.n_compiled += 1
            future = self._cache[spec] = self._pool.submit(self._take_turn, spec, time.monotonic())
        future.add_done_callback(lambda done: self._keep(spec, done))
        return future

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for connection in tuple(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # its thread ends
        self.matchers.close()
        self.worker.close()

    def _keep(self, spec: GrammarSpec, done: Future[Grammar]) -> None:
        """Update the cache when a compilation has ended."""
        with self._lock:
            self._n_compiling -= 1
            error = None if done.cancelled() else done.exception()
            if done.cancelled() or (error and getattr(error, "status", 500) != 400):
                self._cache.pop(spec, None)  # another try may succeed
            else:
                self._sizes[spec] = 0 if error else len(done.result().compiled)
            self._evict()

    def _evict(self) -> None:
        """Remove the least recently used grammars that exceed the bounds."""
        for spec in list(self._cache):
            if len(self._cache) <= MAX_CACHED and sum(self._sizes.values()) <= MAX_CACHED_BYTES:
                return
            if spec in self._sizes:
                del self._cache[spec], self._sizes[spec]

    def _take_turn(self, spec: GrammarSpec, submitted: float) -> Grammar:
        if time.monotonic() - submitted > QUEUE_SECONDS:
            raise GrammarError("too many grammars are being compiled; try again later", 503)
        return self._compile(spec)

    def _compile(self, spec: GrammarSpec) -> Grammar:
        # a process may also end for a reason outside it, such as too little memory for all
        found = self._try(spec) or self._try(spec)
        if found is None:
            raise GrammarError(
                f"the grammar ({spec.kind}) is refused: it is nested too deep, recursive without "
                "end, or too large"
            )
        return found

    def _try(self, spec: GrammarSpec) -> Grammar | None:
        """None if the process ended early."""
        begin = time.monotonic()
        with self.worker.connect(COMPILE) as connection:
            connection.settimeout(COMPILE_SECONDS)
            self._connections.add(connection)
            try:
                send(connection, [spec.kind, spec.text])
                content, compiled = receive(connection)
            except TimeoutError:
                message = "the machine is too busy to compile the grammar; try again later"
                raise GrammarError(message, 503) from None
            except (EOFError, OSError):
                if time.monotonic() - begin < COMPILE_CPU_SECONDS:
                    return None
                content = {"error": "it takes too long to compile"}
            finally:
                self._connections.discard(connection)
        if "error" in content:
            raise GrammarError(f"the grammar ({spec.kind}) is refused: {content['error']}")
        is_json = spec.kind == "json_schema"
        return Grammar(next(self._numbers), compiled, is_json, self._n_tokens)

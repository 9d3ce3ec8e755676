"""Matches outputs with their grammars. Runs in a process of its own (`serve.grammar.worker`).

Where the grammar allows a single text, the output's tokens are those that the tokenizer gives this
text, although the grammar also allows other divisions of it. So they are known without the model,
and the engine appends them without a forward pass each (jump-forward). The last word of the forced
text may be part of a token that also covers text that is not forced; there the model chooses.

The process ends itself when a request uses too much processor time: the timer's signal cannot be
missed by a library that is in a loop. The engine then ends this request and starts the process
again for the others.
"""

import mmap
import signal
import socket
from collections.abc import Collection
from itertools import islice
from typing import Any

import numpy as np
import xgrammar
from numpy.typing import NDArray

from serve.grammar.limits import MATCH_CPU_PER_TOKEN, MATCH_CPU_SECONDS
from serve.grammar.mask import pack
from serve.grammar.messages import (
    FAILED,
    FINISHED,
    OPEN,
    receive_numbers,
    send_numbers,
)
from serve.grammar.vocabulary import Vocabulary

_MOST_FORCED = 4096
"""Forced tokens after which the search ends for this time."""
_LOADING_SECONDS = 2.0
"""Processor time to load a compiled grammar."""


def pack_compiled(compiled: bytes, special: Collection[int]) -> bytes:
    """A serialized grammar with the special tokens that it names."""
    return ",".join(map(str, sorted(special))).encode() + b"\n" + compiled


def unpack_compiled(packed: bytes, vocabulary: Vocabulary) -> tuple[Any, list[int]]:
    special, _, compiled = packed.partition(b"\n")
    grammar = xgrammar.CompiledGrammar.deserialize_json(compiled.decode(), vocabulary.info)
    return grammar, [int(token) for token in special.split(b",") if token]


class Matcher:
    """The state of a grammar after the tokens of one output."""

    def __init__(
        self, compiled: Any, vocabulary: Vocabulary, is_json: bool, special: Collection[int] = ()
    ) -> None:
        """special: the special tokens that the grammar names; it allows no others."""
        self.vocabulary = vocabulary
        self._allowed = vocabulary.text & vocabulary.printable if is_json else vocabulary.text
        if special:
            named = np.isin(np.arange(len(vocabulary.tokens)), list(special))
            self._allowed = self._allowed | pack(named)
        self.matcher = xgrammar.GrammarMatcher(
            compiled, terminate_without_stop_token=not vocabulary.info.stop_token_ids
        )
        self.mask: NDArray[np.int32] = np.zeros((1, len(vocabulary.not_ends)), np.int32)
        """`[1, W]`: the tokens that may be next."""
        self.seconds_left = MATCH_CPU_SECONDS

    def allowance(self, n_tokens: int) -> float:
        """Processor time for the next `n_tokens` tokens."""
        more = n_tokens * MATCH_CPU_PER_TOKEN
        return min(self.seconds_left + more, MATCH_CPU_SECONDS + more)

    def advance(self, tokens: list[int]) -> tuple[list[int], bool]:
        """Continue after `tokens`. Returns the tokens that are forced after them, which it
        continues with, and whether the output is then complete: nothing can follow."""
        self._accept(tokens)
        forced: list[int] = []
        while not self._is_finished():
            run = self._forced_tokens()
            self._accept(run)
            forced += run
            if not run or len(forced) >= _MOST_FORCED:
                return forced, False
        return forced, True

    def _accept(self, tokens: list[int]) -> None:
        for token in tokens:
            if not self.matcher.accept_token(token):
                raise ValueError(f"the grammar does not allow token {token}")

    def _is_finished(self) -> bool:
        """Fills the mask."""
        if self.matcher.is_terminated():
            return True
        return self._fill(self.matcher, self.mask)

    def _fill(self, matcher: Any, mask: NDArray[np.int32]) -> bool:
        """Whether only the end can follow. The library lets strings with a length contain control
        characters, which JSON forbids, and free text all special tokens."""
        matcher.fill_next_token_bitmask(mask)
        mask &= self._allowed
        return matcher.is_completed() and not (mask[0] & self.vocabulary.not_ends).any()

    def _forced_tokens(self) -> list[int]:
        """The tokens of the forced text that cannot be parts of longer ones."""
        text = "" if self.matcher.is_completed() else self.matcher.find_jump_forward_string()
        if not text:
            return []
        encoded = self.vocabulary.tokenizer.encode(text, add_special_tokens=False)
        ids, words, whole = encoded.ids, encoded.word_ids, text.encode()
        keep = len(ids)
        if not self._ends_with(text):
            keep = _without_last_word(words)
            whole = whole[: len(whole) - self.vocabulary.begun_token(text)]
        at = 0
        for n, token in enumerate(ids[:keep]):
            piece = self.vocabulary.tokens[token]
            if not piece or at + len(piece) > len(whole) or whole[at : at + len(piece)] != piece:
                return ids[:n]  # the tokenizer adds a space, or normalizes
            at += len(piece)
        return ids[:keep]

    def _ends_with(self, text: str) -> bool:
        """Whether the output is complete after `text`."""
        ahead = self.matcher.fork()
        if not ahead.accept_string(text) or not ahead.is_completed():
            return False
        return ahead.is_terminated() or self._fill(ahead, np.zeros_like(self.mask))


def _without_last_word(words: list[int | None]) -> int:
    """Number of tokens before the last word, or before the last token of a single word."""
    if len(set(words)) < 2:
        return len(words) - 1
    return words.index(words[-1])


class _Timer:
    """Processor time of one matcher at a time; this process ends when a matcher has none left."""

    def __init__(self) -> None:
        self._of: Matcher | None = None

    def start(self, of: "Matcher | None", seconds: float) -> None:
        """From now on time is that of `of`, which has `seconds`; 0: it is not limited."""
        left, _ = signal.setitimer(signal.ITIMER_PROF, seconds)
        if self._of is not None:
            self._of.seconds_left = max(left, 1e-3)
        self._of = of


def serve_matchers(connection: socket.socket, vocabulary: Vocabulary) -> None:
    """Answer the messages of `serve.grammar.matcher` until the engine closes the connection. The
    first one has the file for the masks."""
    _, (file, *_), _, _ = socket.recv_fds(connection, 1, 1)
    shared = np.frombuffer(mmap.mmap(file, 0), np.int32)
    masks = shared.reshape(-1, len(vocabulary.not_ends))
    grammars: dict[int, tuple[Any, bool, list[int]]] = {}
    matchers: dict[int, Matcher] = {}
    timer = _Timer()
    while True:
        try:
            numbers, body = receive_numbers(connection)
        except EOFError:
            return
        values = iter(numbers)
        for _ in range(next(values)):
            grammars.pop(next(values), None)
        for _ in range(next(values)):
            matchers.pop(next(values), None)
        at = 0
        answer: list[int] = []
        errors: list[bytes] = []
        for item in range(next(values)):
            number, key, is_json, n_compiled, n_tokens = islice(values, 5)
            if n_compiled:
                timer.start(None, _LOADING_SECONDS)
                compiled, special = unpack_compiled(body[at : at + n_compiled], vocabulary)
                at += n_compiled
                grammars[key] = compiled, bool(is_json), special
            matcher = matchers.get(number)
            if matcher is None:
                compiled, has_json, special = grammars[key]
                matcher = matchers[number] = Matcher(compiled, vocabulary, has_json, special)
            timer.start(matcher, matcher.allowance(n_tokens))
            matcher.mask = masks[item : item + 1]
            try:
                forced, finished = matcher.advance(list(islice(values, n_tokens)))
                answer += FINISHED if finished else OPEN, len(forced), *forced
            except Exception as error:
                errors.append(str(error)[:300].encode())
                answer += FAILED, len(errors[-1])
        timer.start(None, 0)
        send_numbers(connection, answer, b"".join(errors))

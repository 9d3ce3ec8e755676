"""Converts tokens to text, piece by piece, without partial characters or starts of stop strings.

A byte-level token may end inside a UTF-8 character; decoding it yields U+FFFD until the rest is
generated. So text is decoded over a window of recent tokens, and a trailing run of U+FFFD is held
back: at most three, since a UTF-8 character has at most four bytes and earlier ones can no longer
change. The window begins one step before the last clean border, because some tokenizers treat the
first token of a text differently (they strip its leading space). For the same reason the window of
an output begins in its prompt, and tokens without text are never its context.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from serve.text.token_bytes import special_ids

if TYPE_CHECKING:  # a runner without text does not need the library
    from tokenizers import Tokenizer

_UNFINISHED = "\ufffd"
_MOST_UNFINISHED = 3
_MOST_HELD = 64
"""Tokens of a window that is no text so far, such as bytes that are no UTF-8."""
_MOST_CONTEXT = 64
"""Tokens of a prompt among which the context of its output begins."""


class Detokenizer:
    """Incremental `tokenizer.decode`.

    hidden: tokens without text; by default the special ones. prompt: the tokens before, whose text
    is not returned. unfinished: `TokenBytes.unfinished` of the prompt; the character that it begins
    belongs to the output.
    """

    def __init__(
        self,
        tokenizer: "Tokenizer",
        hidden: frozenset[int] | None = None,
        prompt: Sequence[int] = (),
        unfinished: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.hidden = special_ids(tokenizer) if hidden is None else hidden
        self.window = self._context(prompt)
        self.border = len(self.window) if unfinished is None else 0
        """Tokens of the window that are only context."""
        self.shown = self.decode(self.window)
        """The part of the window's text that was returned."""
        self.held = 0
        """Characters of the window's text that are held back."""
        if unfinished is not None:
            self.held = 1
            self.shown = self.decode(self.window[: len(self.window) - unfinished])
            self.shown = self.shown[: len(self.shown) - _held(self.shown)]

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=False)
        return text

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """The last visible tokens of the prompt, from the start of a character."""
        window: list[int] = []
        for token in reversed(prompt[-_MOST_CONTEXT:]):
            if token not in self.hidden:
                window.insert(0, token)
                if len(window) >= 4 and not self.decode(window).startswith(_UNFINISHED):
                    break
        return window

    def add(self, token: int) -> str:
        """The characters that `token` completes."""
        if token in self.hidden:
            return ""
        self.window.append(token)
        text = self.decode(self.window)
        self.held = _held(text)
        is_long = len(self.window) > self.border + _MOST_HELD
        if self.held and not text.startswith(self.shown):
            # byte-fallback decoders yield wrong text for a run of bytes until its last one
            return self._shorten(text) if is_long else ""
        new = text[len(self.shown) : len(text) - self.held]
        self.shown += new
        if not self.held:
            self.window = self.window[self.border :]
            self.border = len(self.window)
            self.shown = self.decode(self.window)
        elif is_long:
            new += self._shorten(text)
        return new

    def _shorten(self, text: str) -> str:
        """Continue with the last tokens of a window that has been undecodable for long; otherwise
        each further token would cost more. Returns text that is final now.

        text: of the window.
        """
        last = self.window[-_MOST_HELD // 2 :]
        end = self.decode(last)
        if _held(end) == self.held and text.endswith(end):
            new, kept = "", end[: len(end) - self.held]
        else:  # these tokens read otherwise alone: they are given up
            new, kept, last, self.held = text[len(self.shown) :], "", [], 0
        self.window, self.border, self.shown = last, 0, kept
        return new

    def preview(self, token: int) -> str | None:
        """The whole characters that `token` would add; None if it begins or ends inside one."""
        if self.held:
            return None
        text = self.decode([*self.window, token])
        return None if _held(text) else text[len(self.shown) :]

    def finish(self) -> str:
        """The text held back: bytes that never became a character, as U+FFFD."""
        text = self.decode(self.window)
        new, self.shown, self.held = text[len(self.shown) :], text, 0
        return new


def _held(text: str) -> int:
    """Number of characters at the end of `text` that are not final."""
    tail = text[-_MOST_UNFINISHED:]
    return len(tail) - len(tail.rstrip(_UNFINISHED))


@functools.lru_cache(maxsize=1024)
def _borders(stop: str) -> tuple[int, ...]:
    """For each prefix of `stop`: the length of its longest proper prefix that is also its end
    (Knuth-Morris-Pratt)."""
    borders, length = [0], 0
    for char in stop[1:]:
        while length and char != stop[length]:
            length = borders[length - 1]
        length += char == stop[length]
        borders.append(length)
    return tuple(borders)


class StopMatcher:
    """Searches for stop strings in text that arrives in pieces.

    The first to be complete ends the text, and of several with the same end the longest, so the
    result does not depend on the pieces.
    The cost of a character is constant for each stop string, however similar both are.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.begun = [0] * len(self.stops)
        """Characters of each stop string that the text ends with."""
        self.held = ""
        self.matched: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self.matched is not None

    def add(self, text: str) -> str:
        """The text that can no longer be part of a stop string; sets `matched` at the first
        match."""
        if not self.stops:
            return text
        new, text = text, self.held + text
        found = [(at + len(stop), at, stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.held = ""
            _, at, self.matched = min(found)
            return text[:at]
        for i, stop in enumerate(self.stops):
            self.begun[i] = _advance(stop, self.begun[i], new)
        keep = max(self.begun)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        text, self.held = self.held, ""
        return text


def _advance(stop: str, begun: int, text: str) -> int:
    borders = _borders(stop)
    for char in text:
        while begun and char != stop[begun]:
            begun = borders[begun - 1]
        begun += char == stop[begun]
    return begun


class TextStream:
    """The text of one request: detokenizer, then stop strings."""

    def __init__(
        self,
        tokenizer: "Tokenizer",
        stops: Sequence[str],
        hidden: frozenset[int] | None = None,
        prompt: Sequence[int] = (),
        unfinished: int | None = None,
    ) -> None:
        self.characters = Detokenizer(tokenizer, hidden, prompt, unfinished)
        self.matcher = StopMatcher(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; nothing after it is returned."""
        return self.matcher.stopped

    def add(self, token: int, may_stop: bool = True) -> str:
        """Text that is final now. may_stop: False while stop strings are ignored."""
        text = self.characters.add(token)
        return self.matcher.add(text) if may_stop else text

    def finish(self) -> str:
        """The text still held back. Held bytes may still complete a stop string."""
        if self.stopped:
            return ""
        text = self.matcher.add(self.characters.finish())
        return text if self.stopped else text + self.matcher.finish()

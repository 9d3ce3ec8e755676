"""Converts tokens to text, piece by piece, without partial characters or starts of stop strings.

A byte-level token may end inside a UTF-8 character; decoding it yields U+FFFD until the rest is
generated. So text is decoded over a window of recent tokens, and a trailing run of U+FFFD is held
back: at most three, since a UTF-8 character has at most four bytes and earlier ones can no longer
change. The window begins one step before the last clean border, because some tokenizers treat the
first token of a text differently (they strip its leading space).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a runner without text does not need the library
    from tokenizers import Tokenizer

_UNFINISHED = "\ufffd"
_MOST_UNFINISHED = 3


class Detokenizer:
    """Incremental `tokenizer.decode` without special tokens."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self.tokenizer = tokenizer
        self.window: list[int] = []
        self.border = 0
        """Tokens of the window that are only context."""
        self.shown = ""
        """The part of the window's text that was returned."""

    def add(self, token: int) -> str:
        """The characters that `token` completes."""
        self.window.append(token)
        text = self.tokenizer.decode(self.window)
        tail = text[-_MOST_UNFINISHED:]
        held = len(tail) - len(tail.rstrip(_UNFINISHED))
        if held and not text.startswith(self.shown):
            # byte-fallback decoders yield wrong text for a run of bytes until its last one
            return ""
        new = text[len(self.shown) : len(text) - held]
        self.shown += new
        if not held:
            self.window = self.window[self.border :]
            self.border = len(self.window)
            self.shown = self.tokenizer.decode(self.window)
        return new

    def finish(self) -> str:
        """The text held back: bytes that never became a character, as U+FFFD."""
        text = self.tokenizer.decode(self.window)
        new, self.shown = text[len(self.shown) :], text
        return new


class StopMatcher:
    """Searches for stop strings in text that arrives in pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """The text that can no longer be part of a stop string; sets `stopped` at the first
        match."""
        if not self.stops:
            return text
        text = self.held + text
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self.stops)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        text, self.held = self.held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper prefix of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class TextStream:
    """The text of one request: detokenizer, then stop strings."""

    def __init__(self, tokenizer: "Tokenizer", stops: Sequence[str]) -> None:
        self.characters = Detokenizer(tokenizer)
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

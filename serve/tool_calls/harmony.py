"""Divides an answer of gpt-oss: messages with a channel, of which some are calls.

`<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...`. The
channel `analysis` is reasoning, a message to `functions.NAME` is a call, and others are content.
"""

import re
from collections.abc import Iterable

from serve.tool_calls.scan import Event, find_exact

START, MESSAGE = "<|start|>", "<|message|>"
_CHANNEL = "<|channel|>"
_RECIPIENT = " to="
ENDS = ("<|end|>", "<|call|>", "<|return|>", START)
MARKS = (*ENDS, MESSAGE, _CHANNEL, "<|constrain|>")
_CALL = re.compile(r"to=functions\.([A-Za-z0-9_.-]{1,64})")
_MOST_HEADER = 512
_CONTROL = {code: f"\\u{code:04x}" for code in range(0x20)}


class HarmonyParser:
    """tools: the functions that may be called. The text begins after `<|start|>assistant`."""

    def __init__(self, tools: Iterable[str]) -> None:
        self.tools = frozenset(tools)
        self._text = ""
        self._kind: str | None = None
        """Of the message whose text follows; None in a header."""
        self._between = False
        """Whether a message has ended and the next one has not begun."""

    def add(self, text: str, last: bool) -> list[Event]:
        """The parts of the next piece. last: nothing follows."""
        self._text += text
        found: list[Event] = []
        while self._step(found, last):
            pass
        return [(kind, text) for kind, text in found if text]

    def _step(self, found: list[Event], last: bool) -> bool:
        if self._kind is None:
            return self._header(found, last)
        at, mark = find_exact(ENDS, self._text, last)
        text = self._text[:at]
        found.append((self._kind, text.translate(_CONTROL) if self._kind == "arguments" else text))
        self._text = self._text[at + len(mark) :]
        if mark:
            self._kind, self._between = None, True
            if mark == START:
                self._between = False
        return bool(mark)

    def _header(self, found: list[Event], last: bool) -> bool:
        text = self._text
        if self._between:
            at, mark = find_exact((START,), text, last)
            self._text = text[at + len(mark) :]
            self._between = not mark
            return bool(mark)
        start = text.removeprefix("assistant")
        is_header = any(
            mark.startswith(start[: len(mark)]) for mark in (_CHANNEL, _RECIPIENT, MESSAGE)
        ) or "assistant".startswith(text)
        at = text.find(MESSAGE)
        if at < 0 and is_header and len(text) < _MOST_HEADER:
            return False  # at the end of the text it is the beginning of a header
        if at < 0 or not is_header:  # text of a model that has not learned the format
            self._kind = "content"
            return True
        self._kind = self._begin(text[:at], found)
        self._text = text[at + len(MESSAGE) :]
        return True

    def _begin(self, header: str, found: list[Event]) -> str:
        """The kind of the message after a header."""
        call = _CALL.search(header)
        if call is not None and call[1] in self.tools:
            found.append(("name", call[1]))
            return "arguments"
        return "reasoning" if f"{_CHANNEL}analysis" in header else "content"

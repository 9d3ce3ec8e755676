"""Searches in text that arrives in pieces."""

from collections.abc import Iterable

_MOST_SPACE = 16
"""Characters of white space in a mark; a model that wanders in it writes no mark."""
Event = tuple[str, str]
"""A kind and its text: `content`, `reasoning`, `name` (which begins a call) or `arguments`."""


def match(mark: str, text: str, at: int = 0) -> int | None:
    """Where `mark`, which begins at `at`, ends; -1 if it does not; None if `text` ends before that
    is known. Differences in white space are ignored."""
    for char in mark:
        if char.isspace():
            continue
        begin = at
        while at < len(text) and text[at].isspace() and at - begin <= _MOST_SPACE:
            at += 1
        if at == len(text):
            return None
        if text[at] != char:
            return -1
        at += 1
    return at


def find(mark: str, text: str) -> tuple[int, int | None]:
    """Where `mark` begins and ends; where it may begin and None; or the end of `text` and None."""
    at = text.find(mark[0])
    while at >= 0:
        end = match(mark, text, at)
        if end != -1:
            return at, end
        at = text.find(mark[0], at + 1)
    return len(text), None


def find_exact(marks: Iterable[str], text: str, last: bool) -> tuple[int, str]:
    """The first of `marks` and where it begins; without one, an empty text and where one may
    begin."""
    found = [(at, mark) for mark in marks if (at := text.find(mark)) >= 0]
    if found:
        return min(found, key=lambda one: one[0])
    kept = 0
    if not last:
        for mark in marks:
            sizes = range(min(len(mark) - 1, len(text)), 0, -1)
            kept = max(kept, next((n for n in sizes if text.endswith(mark[:n])), 0))
    return len(text) - kept, ""


class JsonScanner:
    """Where a JSON object ends whose first brace has been read."""

    def __init__(self) -> None:
        self._depth = 1
        self._in_text = self._escaped = False

    def end(self, text: str) -> int | None:
        """The end of the object in the next piece; None if it continues."""
        for at, char in enumerate(text):
            if self._in_text:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_text = False
            elif char == '"':
                self._in_text = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return at + 1
        return None

"""Divides an answer into the reasoning between `<think>` and `</think>`, and the rest."""

from serve.tool_calls.forms import END_THINK, THINK
from serve.tool_calls.scan import Event, find_exact


class ReasoningParser:
    """is_open: whether the prompt ends with `<think>`."""

    def __init__(self, is_open: bool) -> None:
        self._step = "reasoning" if is_open else "before"
        self._text = ""
        self._at_start = True
        """Whether the present part has no text yet; its first line breaks are not part of it."""

    def add(self, text: str, last: bool) -> list[Event]:
        """The parts of the next piece. last: nothing follows."""
        self._text += text
        if self._step == "before" and not self._begins(last):
            return []
        found: list[Event] = []
        if self._step == "reasoning":
            at, mark = find_exact((END_THINK,), self._text, last)
            piece = self._text[:at]
            kept = len(piece) if last and not mark else len(piece.rstrip("\n"))
            found.append(("reasoning", self._begin(piece[:kept])))
            if not mark:
                self._text = self._text[kept:]
                return [one for one in found if one[1]]
            self._step, self._at_start = "content", True
            self._text = self._text[at + len(mark) :]
        if self._step == "content":
            self._text = self._begin(self._text)
        found.append(("content", self._text))
        self._text = ""
        return [one for one in found if one[1]]

    def _begins(self, last: bool) -> bool:
        """Whether it is known if the answer begins with reasoning."""
        start = self._text.lstrip("\n")
        if start.startswith(THINK):
            self._step, self._text = "reasoning", start[len(THINK) :]
        elif last or not THINK.startswith(start):
            self._step = "all"
        else:
            return False
        return True

    def _begin(self, text: str) -> str:
        if self._at_start:
            text = text.lstrip("\n")
            self._at_start = not text
        return text

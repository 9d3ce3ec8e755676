"""Divides the text of an answer into content and calls, piece by piece.

The text may be divided anywhere. What cannot be known yet is held back, and what turns out not to
be a call of one of the tools is content, so that no text is lost; only line breaks next to calls
are.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

from serve.tool_calls.forms import Form, JsonForm, XmlForm
from serve.tool_calls.scan import Event, JsonScanner, find, match
from serve.tool_calls.xml_arguments import Kinds, XmlArguments

_NAME = re.compile(r"[A-Za-z0-9_.-]{0,64}")
_IDENTIFIER = re.compile(r"[A-Za-z0-9_-]{0,64}")
_CONTROL = {code: f"\\u{code:04x}" for code in range(0x20)}
"""JSON has no control characters but escaped ones; the grammar of arguments writes none between
elements, so every one is inside a string."""
_MOST_NAME, _MOST_BEGINNING = 80, 512
"""Characters of a name, and of what precedes the arguments, white space included."""
_Step = Callable[[bool], bool]


class CallParser(ABC):
    """Common part of the forms: free text, and the beginning of a call.

    tools: the kinds of the arguments of each function that may be called.
    """

    def __init__(self, form: Form, tools: Mapping[str, Kinds]) -> None:
        self.form = form
        self.tools = tools
        self.n_calls = 0
        self._mark = form.opens + form.begin
        self._text = ""
        """What is not yet divided."""
        self._line_breaks = ""
        """Before what may be a call."""
        self._begun = ""
        """The beginning of what may be a call."""
        self._found: list[Event] = []
        self._step: _Step = self._outside

    def add(self, text: str, last: bool) -> list[Event]:
        """The parts of the next piece. last: nothing follows."""
        self._text += text
        self._found = []
        while self._step(last):
            pass
        if last:
            self._content(self._begun + self._text)
            if not self.n_calls:
                self._found.append(("content", self._line_breaks))
            self._text = self._begun = self._line_breaks = ""
        return [(kind, text) for kind, text in self._found if text]

    @abstractmethod
    def _arguments_begin(self, at: int, name: str) -> bool | None:
        """Whether arguments of a call begin at a place of the text; None if it is not known."""

    def _content(self, text: str) -> None:
        text = self._line_breaks + text
        kept = text.rstrip("\n")
        self._line_breaks = text[len(kept) :]
        self._found.append(("content", kept))

    def _outside(self, last: bool) -> bool:
        """Each step returns whether the next one can begin."""
        begin, end = find(self._mark, self._text)
        self._content(self._text[:begin])
        if end is None:
            self._text = self._text[begin:]
            return False
        self._enter(begin, end)
        return True

    def _enter(self, begin: int, end: int) -> None:
        self._begun, self._text = self._text[begin:end], self._text[end:]
        self._step = self._name

    def _leave(self) -> bool:
        self._step = self._outside
        return True

    def _name(self, last: bool) -> bool:
        found = _NAME.match(self._text, _n_spaces(self._text))
        assert found is not None
        at = found.end()
        if at == len(self._text) and at < _MOST_NAME:
            return False
        after = self._after_name(at)
        begins = None if after is None else False
        if after is not None and after >= 0 and found[0] in self.tools:
            begins = self._arguments_begin(after, found[0])
        if begins is None and len(self._text) < _MOST_BEGINNING:
            return False
        if not begins:  # it is no call: its first character is content, and the rest may be one
            text = self._begun + self._text
            self._content(text[:1])
            self._text, self._begun = text[1:], ""
            return self._leave()
        self.n_calls += 1
        self._found.append(("name", found[0]))
        self._begun = self._line_breaks = ""
        return True

    def _after_name(self, at: int) -> int | None:
        identifier = self.form.identifier if isinstance(self.form, JsonForm) else ""
        if identifier:
            after = match(identifier, self._text, at)
            if after is None:
                return None
            if after >= 0:
                found = _IDENTIFIER.match(self._text, after)
                assert found is not None
                at = found.end()
                if at == len(self._text):
                    return None
        return match(self.form.middle, self._text, at)

    def _ended(self, last: bool) -> bool:
        """After a call: another one, or the end of the calls."""
        form = self.form
        if not form.opens:
            return self._leave()
        following = match(form.separator + form.begin, self._text)
        closing = match(form.closes, self._text)
        if following is not None and following >= 0:
            self._enter(0, following)
            return True
        if closing is not None and closing >= 0:
            self._text = self._text[closing:]
            return self._leave()
        if (following is None or closing is None) and not last:
            return False
        if last and (following is None or closing is None):
            self._text = ""  # the beginning of a mark
        return self._leave()


def _n_spaces(text: str) -> int:
    start = text[:16]
    return len(start) - len(start.lstrip())


class JsonCallParser(CallParser):
    """Calls whose arguments are JSON."""

    def __init__(self, form: JsonForm, tools: Mapping[str, Kinds]) -> None:
        super().__init__(form, tools)
        self._is_object = form.is_object
        self._end = form.end[1:] if form.is_object else form.end
        self._scanner = JsonScanner()
        self._brace = ""

    def _arguments_begin(self, at: int, name: str) -> bool | None:
        rest = self._text[at:].lstrip()
        if not rest:
            return None
        if rest[0] != "{":
            return False
        self._scanner = JsonScanner()
        self._text, self._brace = rest[1:], rest[0]
        self._step = self._arguments
        return True

    def _arguments(self, last: bool) -> bool:
        end = self._scanner.end(self._text)
        piece = self._brace + self._text[:end]
        self._brace = ""
        self._found.append(("arguments", piece.translate(_CONTROL)))
        self._text = "" if end is None else self._text[end:]
        if end is None:
            return False
        self._scanner = JsonScanner()
        self._step = self._other_members if self._is_object else self._after_arguments
        return True

    def _other_members(self, last: bool) -> bool:
        """The rest of the object that is the call."""
        end = self._scanner.end(self._text)
        self._text = "" if end is None else self._text[end:]
        self._step = self._step if end is None else self._after_arguments
        return end is not None

    def _after_arguments(self, last: bool) -> bool:
        end = match(self._end, self._text)
        if end is None:
            if last:
                self._text = ""
            return False
        if end >= 0:
            self._text = self._text[end:]
        self._step = self._ended
        return True


class XmlCallParser(CallParser):
    """Calls whose arguments are elements."""

    def __init__(self, form: XmlForm, tools: Mapping[str, Kinds]) -> None:
        super().__init__(form, tools)
        self.xml = form
        self._arguments = XmlArguments(form, {})

    def _arguments_begin(self, at: int, name: str) -> bool | None:
        for mark in (self.xml.key, self.xml.end):
            after = match(mark, self._text, at)
            if after is None:
                return None
            if after >= 0:
                self._arguments = XmlArguments(self.xml, self.tools[name])
                self._text = self._text[at:]
                self._step = self._elements
                return True
        return False

    def _elements(self, last: bool) -> bool:
        written, rest = self._arguments.add(self._text, last)
        self._found.append(("arguments", written))
        self._text = "" if rest is None else rest
        if rest is None:
            return False
        self._step = self._ended
        return True

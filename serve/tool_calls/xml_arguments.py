"""Arguments that a model writes as elements, as JSON.

A string is written as it is, and other values as JSON, so the schema of an argument decides how its
text is read. Where it allows both, a text that is JSON is read as that.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from serve.tool_calls.forms import XmlForm
from serve.tool_calls.scan import find_exact, match

Kinds = Mapping[str, str]
"""Of each argument: `text`, `json`, or `any`, which is that of arguments that are not listed."""
_MOST_KEY = 256
_CONSTANTS = {"True": "true", "False": "false", "None": "null"}


def kinds_of(schema: Any) -> dict[str, str]:
    """The kinds of the properties of a schema."""
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(properties, dict):
        return {}
    definitions = schema.get("$defs") or schema.get("definitions") or {}
    kinds = _SchemaKinds(definitions if isinstance(definitions, dict) else {})
    return {str(key): kinds.of(one) for key, one in properties.items()}


class _SchemaKinds:
    """The kinds of schemas with common definitions, each of which is looked at once: a schema that
    refers to itself several times has no end otherwise."""

    def __init__(self, definitions: dict[str, Any]) -> None:
        self.definitions = definitions
        self._known: dict[str, str] = {}

    def of(self, schema: Any, depth: int = 0) -> str:
        """`text` if a schema allows strings only, `json` if it allows none, else `any`."""
        if not isinstance(schema, dict) or depth > 8:
            return "any"
        if isinstance(reference := schema.get("$ref"), str):
            name = reference.rsplit("/", 1)[-1]
            if name not in self._known:
                self._known[name] = "any"  # for references to it within it
                self._known[name] = self.of(self.definitions.get(name), depth + 1)
            return self._known[name]
        for keyword in ("anyOf", "oneOf"):
            if isinstance(branches := schema.get(keyword), list) and branches:
                return _common({self.of(one, depth + 1) for one in branches})
        return _kind_of_values(schema)


def _kind_of_values(schema: dict[str, Any]) -> str:
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list) and values:
        return _common({"text" if isinstance(one, str) else "json" for one in values})
    types = schema.get("type")
    listed = types if isinstance(types, list) else [types]
    if types is None or not listed:
        return "any"
    return _common({"text" if one == "string" else "json" for one in listed})


def _common(kinds: set[str]) -> str:
    return kinds.pop() if len(kinds) == 1 else "any"


class XmlArguments:
    """The elements of one call, piece by piece."""

    def __init__(self, form: XmlForm, kinds: Kinds) -> None:
        self.form = form
        self.kinds = kinds
        self._value_end = form.value_end.strip()
        self._strips = form.value_end.startswith("\n")
        """Whether a line break at the beginning and the end of a value is not part of it."""
        self._text = ""
        self._written = "{"
        self._n = 0
        self._kind = "any"
        self._at_start = False
        self._step: Callable[[bool], bool] = self._between
        self._rest: str | None = None

    def add(self, text: str, last: bool) -> tuple[str, str | None]:
        """The JSON of the next piece, and the text after the call; None if it has not ended."""
        self._text += text
        while self._step(last):
            pass
        written, self._written = self._written, ""
        return written, self._rest

    def _between(self, last: bool) -> bool:
        """Each step returns whether the next one can begin."""
        begun = match(self.form.key, self._text)
        if begun is not None and begun >= 0:
            self._text = self._text[begun:]
            self._step = self._key
            return True
        end = match(self.form.end, self._text)
        if (begun is None or end is None) and not last:
            return False
        if begun is None or end is None:  # it is cut
            self._text, self._rest = "", None
            return False
        self._written += "}"
        self._rest = self._text if end < 0 else self._text[end:]
        return False

    def _key(self, last: bool) -> bool:
        at, end = _find_mark(self.form.value.rstrip("\n"), self._text)
        if end is None and at <= _MOST_KEY:
            return False
        key = self._text[:at].strip()
        self._text = self._text[at if end is None else end :]
        self._kind = self.kinds.get(key, "any")
        self._written += (", " if self._n else "") + json.dumps(key, ensure_ascii=False) + ": "
        self._n += 1
        self._at_start = True
        if self._kind == "text":
            self._written += '"'
            self._step = self._string
        else:
            self._step = self._value
        return True

    def _string(self, last: bool) -> bool:
        """A text as it arrives."""
        if self._at_start and self._strips:
            if not self._text and not last:
                return False
            self._text = self._text.removeprefix("\n")
            self._at_start = False
        at, mark = find_exact((self._value_end,), self._text, last)
        text, ended = self._text[:at], bool(mark)
        kept = 1 if self._strips and text.endswith("\n") else 0
        text = text[: len(text) - kept]
        self._written += json.dumps(text, ensure_ascii=False)[1:-1]
        if not ended:
            self._text = self._text[at - kept :]
            return False
        self._text = self._text[at + len(mark) :]
        self._written += '"'
        self._step = self._between
        return True

    def _value(self, last: bool) -> bool:
        """Other values, when they are complete."""
        at, mark = find_exact((self._value_end,), self._text, last)
        if not mark:
            return False
        text, self._text = self._text[:at], self._text[at + len(mark) :]
        if self._strips:
            text = text.removeprefix("\n").removesuffix("\n")
        self._written += _as_json(text, self._kind == "any")
        self._step = self._between
        return True


def _as_json(text: str, may_be_text: bool) -> str:
    """The JSON of a value that is written as JSON, or as Python writes a constant."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _CONSTANTS.get(text) or json.dumps(text, ensure_ascii=False)
    is_text = may_be_text and isinstance(value, str)  # a string is written without quotes
    return json.dumps(text, ensure_ascii=False) if is_text else text.strip()


def _refuse(name: str) -> None:
    raise ValueError(name)


def _find_mark(mark: str, text: str) -> tuple[int, int | None]:
    """Where a mark begins and ends, whose parts may have white space between them."""
    begin = text.find(mark[0])
    if begin < 0:
        return len(text), None
    end = match(mark, text, begin)
    return (begin, None) if end is None or end < 0 else (begin, end)

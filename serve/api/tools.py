"""Tools of chats: the calls that a model may write, and OpenAI's form of them.

A call is written as Hermes and Qwen models are trained to:

    <tool_call>
    {"name": "add", "arguments": {"a": 1, "b": 2}}
    </tool_call>

A structural tag restricts the output to such calls of the given functions, with arguments that
match their schemas: exactly one (a named function), at least one and nothing else (`required`), or
text in which every `<tool_call>` begins one (`auto`).
https://platform.openai.com/docs/guides/function-calling
"""

import json
import re
import uuid
from dataclasses import dataclass
from typing import Any

from serve.api.errors import Json
from serve.api.fields import flag
from serve.engine.request import RequestError

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_OPEN = "<tool_call>"
_BEGIN = '<tool_call>\n{"name": '
_MIDDLE = ', "arguments": '
_END = "}\n</tool_call>"
_NO_PARAMETERS: Json = {"type": "object", "properties": {}}
_CONTROL = {code: f"\\u{code:04x}" for code in range(0x20)}
"""JSON has no control characters but escaped ones; the grammar of arguments writes none between
elements, so every one is inside a string."""


@dataclass(frozen=True)
class Tools:
    """The tools of a call that may use them."""

    definitions: list[Json]
    """As the chat template reads them."""
    named: bool
    """Whether the call names the function."""
    structural_tag: Json


def parse_tools(fields: Json) -> tuple[list[Json], Tools | None]:
    """The definitions for the template, and the tools if they may be called. Raises
    RequestError."""
    definitions, choice = fields.get("tools") or [], fields.get("tool_choice")
    if not isinstance(definitions, list) or len(definitions) > MAX_TOOLS:
        raise RequestError(f"tools must be a list of at most {MAX_TOOLS}", "tools")
    parameters = dict(_parse_tool(one, f"tools[{i}]") for i, one in enumerate(definitions))
    if len(parameters) != len(definitions):
        raise RequestError("two tools have the same name", "tools")
    if choice is None:
        choice = "auto" if definitions else "none"
    if choice == "none" or (choice == "auto" and not definitions):
        return definitions, None
    named = False
    if isinstance(choice, dict):
        name, named = _named(choice), True
        if not isinstance(name, str) or name not in parameters:
            raise RequestError(f"tool_choice: there is no tool {str(name)!r:.80}", "tool_choice")
        parameters = {name: parameters[name]}
    elif choice not in ("auto", "required") or not definitions:
        kinds = "none, auto, required or a function of tools"
        raise RequestError(f"tool_choice must be {kinds}", "tool_choice")
    one_only = named or not flag(fields, "parallel_tool_calls", True)
    tag = _structural_tag(parameters, choice == "auto", one_only)
    return definitions, Tools(definitions, named, tag)


def _parse_tool(tool: Any, place: str) -> tuple[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or tool.get("type", "function") != "function":
        raise RequestError(f"{place} must be an object of type function", "tools")
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            f"{place}.function.name must be 1 to 64 letters, digits, _, - or .", "tools"
        )
    if not isinstance(parameters, dict | None):
        raise RequestError(f"{place}.function.parameters must be a JSON schema", "tools")
    return name, parameters or _NO_PARAMETERS


def _named(choice: Json) -> object:
    function = choice.get("function")
    return function.get("name") if isinstance(function, dict) else choice.get("name")


def _structural_tag(parameters: Json, free_text: bool, one_only: bool) -> Json:
    tags = [
        {
            "type": "tag",
            "begin": _BEGIN + json.dumps(name) + _MIDDLE,
            "content": {"type": "json_schema", "json_schema": schema},
            "end": _END,
        }
        for name, schema in parameters.items()
    ]
    content: Json = {"tags": tags, "stop_after_first": one_only}
    if free_text:
        content |= {"type": "triggered_tags", "triggers": [_OPEN], "at_least_one": False}
    else:
        content |= {"type": "tags_with_separator", "separator": "\n", "at_least_one": True}
    return {"type": "structural_tag", "format": content}


class ToolCallParser:
    """Divides a text, piece by piece, into content and calls. It never waits longer than needed to
    distinguish them. named: whether the call names the function."""

    def __init__(self, named: bool) -> None:
        self.named = named
        self.content: list[str] = []
        self.calls: list[Json] = []
        """In OpenAI's form, with the arguments so far."""
        self._text = ""
        """What is not yet divided."""
        self._inside = False

    def add(self, text: str, last: bool) -> Json:
        """The delta of the next piece."""
        self._text += text
        content, calls = "", []
        while True:
            if self._inside:
                piece, ended = self._until(_END, last)
                piece = piece.translate(_CONTROL)
                if piece:
                    self.calls[-1]["function"]["arguments"] += piece
                    index = len(self.calls) - 1
                    calls.append({"index": index, "function": {"arguments": piece}})
                if not ended:
                    break
                self._inside = False
                continue
            piece, begun = self._until(_BEGIN, last)
            content += piece.strip("\n") if self.calls else piece
            if not begun:
                break
            name, found, rest = self._text.partition(_MIDDLE)
            if not found:
                self._text = _BEGIN + self._text
                break
            self._text, self._inside = rest, True
            calls.append(self._begin(json.loads(name)))
        self.content.append(content)
        delta: Json = {"content": content} if content else {}
        return delta | ({"tool_calls": _joined(calls)} if calls else {})

    def finish_reason(self, reason: str | None) -> str | None:
        """OpenAI's, which is `stop` for a function that the call names."""
        calls = reason == "stop" and self.calls and not self.named
        return "tool_calls" if calls else reason

    def _begin(self, name: str) -> Json:
        call: Json = {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }
        self.calls.append(call)
        return {"index": len(self.calls) - 1} | call | {"function": dict(call["function"])}

    def _until(self, mark: str, last: bool) -> tuple[str, bool]:
        """The text before `mark`, which is removed, and whether it is there. The end of the text
        that may be its beginning stays."""
        piece, found, rest = self._text.partition(mark)
        if found:
            self._text = rest
            return piece, True
        kept = 0
        if not last:
            sizes = range(min(len(mark) - 1, len(piece)), 0, -1)
            kept = next((n for n in sizes if piece.endswith(mark[:n])), 0)
        self._text = piece[len(piece) - kept :]
        return piece[: len(piece) - kept], False


def _joined(calls: list[Json]) -> list[Json]:
    """At most one delta per call."""
    found: dict[int, Json] = {}
    for call in calls:
        if call["index"] in found:
            function = found[call["index"]]["function"]
            function["arguments"] += call["function"]["arguments"]
        else:
            found[call["index"]] = call
    return list(found.values())

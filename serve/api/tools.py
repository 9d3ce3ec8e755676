"""Tools of chats: their fields in a request, and OpenAI's form of the calls in an answer.

The grammar of an answer allows exactly one call (a named function), at least one and nothing else
(`required`), or text in which calls may begin (`auto`). How a call is written depends on the model
(`serve.tool_calls`).
https://platform.openai.com/docs/guides/function-calling
"""

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serve.api.errors import Json
from serve.api.fields import flag
from serve.engine.request import RequestError
from serve.grammar.limits import MAX_GRAMMAR_CHARS
from serve.tool_calls.forms import Form, HarmonyForm, JsonForm, XmlForm
from serve.tool_calls.harmony import HarmonyParser
from serve.tool_calls.parser import CallParser, JsonCallParser, XmlCallParser
from serve.tool_calls.reasoning import ReasoningParser
from serve.tool_calls.scan import Event
from serve.tool_calls.structure import Tool
from serve.tool_calls.xml_arguments import kinds_of

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_NO_PARAMETERS: Json = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class Tools:
    """The tools of a request that may use them."""

    callable: list[Tool]
    free_text: bool
    """Whether there may be other text, and no call."""
    one_only: bool
    named: bool
    """Whether the request names the function."""


def parse_tools(fields: Json) -> tuple[list[Json], Tools | None]:
    """The definitions for the template, and the tools if they may be called. Raises
    RequestError."""
    definitions, choice = fields.get("tools") or [], fields.get("tool_choice")
    if not isinstance(definitions, list) or len(definitions) > MAX_TOOLS:
        raise RequestError(f"tools must be a list of at most {MAX_TOOLS}", "tools")
    tools = {
        tool.name: tool
        for tool in (_parse_tool(one, f"tools[{i}]") for i, one in enumerate(definitions))
    }
    if len(tools) != len(definitions):
        raise RequestError("two tools have the same name", "tools")
    if choice is None:
        choice = "auto" if definitions else "none"
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        choice, names = _parse_allowed(choice)
        tools = {tool.name: tool for tool in (_named_tool(tools, name) for name in names)}
    if choice == "none" or (choice == "auto" and not definitions):
        return definitions, None
    _check_size(definitions)
    named = False
    if isinstance(choice, dict):
        named, tool = True, _named_tool(tools, _name_of(choice))
        tools = {tool.name: tool}
    elif choice not in ("auto", "required") or not definitions:
        kinds = "none, auto, required or a function of tools"
        raise RequestError(f"tool_choice must be {kinds}", "tool_choice")
    one_only = named or not flag(fields, "parallel_tool_calls", True)
    return definitions, Tools(list(tools.values()), choice == "auto", one_only, named)


def _check_size(definitions: list[Any]) -> None:
    """Before anything is made of them."""
    try:
        size = len(json.dumps(definitions, ensure_ascii=False))
    except RecursionError:
        raise RequestError("tools are nested too deep", "tools") from None
    if size > MAX_GRAMMAR_CHARS:
        raise RequestError(f"tools must have at most {MAX_GRAMMAR_CHARS} characters", "tools")


def _parse_tool(tool: Any, place: str) -> Tool:
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
    return Tool(name, parameters or _NO_PARAMETERS, flag(function, "strict"))


def _parse_allowed(choice: Json) -> tuple[object, list[object]]:
    """The mode and the names of OpenAI's `allowed_tools`."""
    inner = choice.get("allowed_tools")
    inner = inner if isinstance(inner, dict) else {}
    mode, listed = inner.get("mode"), inner.get("tools")
    if mode not in ("auto", "required") or not isinstance(listed, list) or not listed:
        raise RequestError(
            "tool_choice.allowed_tools must have the mode auto or required, and tools",
            "tool_choice",
        )
    return mode, [_name_of(one) if isinstance(one, dict) else None for one in listed]


def _name_of(choice: Json) -> object:
    function = choice.get("function")
    return function.get("name") if isinstance(function, dict) else choice.get("name")


def _named_tool(tools: dict[str, Tool], name: object) -> Tool:
    if not isinstance(name, str) or name not in tools:
        raise RequestError(f"tool_choice: there is no tool {str(name)!r:.80}", "tool_choice")
    return tools[name]


class MessageParser:
    """Divides a text, piece by piece, into content, reasoning and calls.

    Args:
        form: Of the calls.
        tools: The functions that may be called.
        named: Whether the request names the function.
        reasoning: The parser of reasoning; None if the model has none, or it is content.
    """

    def __init__(
        self,
        form: Form,
        tools: Sequence[Tool] = (),
        named: bool = False,
        reasoning: ReasoningParser | None = None,
    ) -> None:
        self.named = named
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[Json] = []
        """In OpenAI's form, with the arguments so far."""
        self._reasoning = reasoning
        self._calls: CallParser | HarmonyParser | None = None
        kinds = {tool.name: kinds_of(tool.schema) for tool in tools}
        if isinstance(form, HarmonyForm):
            self._calls = HarmonyParser(kinds)
        elif isinstance(form, JsonForm) and tools:
            self._calls = JsonCallParser(form, kinds)
        elif isinstance(form, XmlForm) and tools:
            self._calls = XmlCallParser(form, kinds)

    def add(self, text: str, last: bool) -> Json:
        """The delta of the next piece."""
        delta: Json = {}
        calls: list[Json] = []
        for kind, piece in self._events(text, last):
            if kind == "name":
                calls.append(self._begin(piece))
            elif kind == "arguments":
                self.calls[-1]["function"]["arguments"] += piece
                index = len(self.calls) - 1
                if not calls or calls[-1]["index"] != index:
                    calls.append({"index": index, "function": {"arguments": ""}})
                calls[-1]["function"]["arguments"] += piece
            else:
                listed = self.content if kind == "content" else self.reasoning
                listed.append(piece)
                name = "content" if kind == "content" else "reasoning_content"
                delta[name] = delta.get(name, "") + piece
        return delta | ({"tool_calls": calls} if calls else {})

    def _events(self, text: str, last: bool) -> list[Event]:
        events: list[Event] = [("content", text)]
        if self._reasoning is not None:
            events = self._reasoning.add(text, last)
        if self._calls is None:
            return [one for one in events if one[1]]
        content = "".join(piece for kind, piece in events if kind == "content")
        return [one for one in events if one[0] != "content"] + self._calls.add(content, last)

    def finish_reason(self, reason: str | None) -> str | None:
        """OpenAI's, which is `stop` for a function that the request names."""
        calls = reason == "stop" and self.calls and not self.named
        return "tool_calls" if calls else reason

    def message(self) -> Json:
        """The whole message."""
        found: Json = {"role": "assistant", "content": "".join(self.content), "refusal": None}
        if self.reasoning:
            found["reasoning_content"] = "".join(self.reasoning)
        if self.calls:
            found |= {"content": found["content"] or None, "tool_calls": self.calls}
        return found

    def _begin(self, name: str) -> Json:
        call: Json = {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }
        self.calls.append(call)
        return {"index": len(self.calls) - 1} | call | {"function": dict(call["function"])}

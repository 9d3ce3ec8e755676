"""Which form a chat template writes, and how it expects the calls of earlier messages.

The template itself decides: it renders a conversation with a call, and the form is the one that
writes this call as the template did.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from serve.tool_calls.forms import END_THINK, FORMS, HARMONY, HERMES, Form

_NAME, _IDENTIFIER = "probe", "call00000"
_ARGUMENTS = {"first": 'a "quoted" é', "second": [1, {"third": False}]}
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "",
        "parameters": {"type": "object", "properties": {key: {} for key in _ARGUMENTS}},
    },
}
Render = Callable[[dict[str, Any]], str | None]


@dataclass(frozen=True)
class ChatFormat:
    """What is known of the answers of a model."""

    form: Form = HERMES
    """Of its calls."""
    thinks: bool = False
    """Whether it may reason before it answers."""
    arguments_as_text: bool = False
    """Whether the template reads the arguments of earlier calls as the text of their JSON."""
    empty_content: bool = True
    """Whether the template reads an empty text where a message has no content, instead of None."""
    is_known: bool = True
    """Whether the template writes calls in this form, or the form was given."""


def choose_format(source: str, render: Render, name: str = "auto") -> ChatFormat:
    """The format of a template. name: that of a form, if it is given.

    Args:
        source: The template.
        render: Renders it with variables; None if it fails.
        name: `auto`, or a name of `FORMS`.
    """
    is_harmony = "<|channel|>" in source and "<|message|>" in source
    known = HARMONY if is_harmony else FORMS.get(name)
    if name != "auto":
        known = FORMS[name]
    thinks = END_THINK in source and known is not HARMONY
    for as_text in (False, True):
        for empty in (False, True):
            text = render(_conversation(as_text, empty))
            if text is None or (not empty and "None" in text):
                continue
            for form in FORMS.values() if known is None else (known,):
                if form.opens + form.write(_NAME, _ARGUMENTS, _IDENTIFIER) in text:
                    return ChatFormat(form, thinks, as_text, empty)
    return ChatFormat(known or HERMES, thinks, is_known=known is not None)


def _conversation(as_text: bool, empty: bool) -> dict[str, Any]:
    arguments: Any = json.dumps(_ARGUMENTS, ensure_ascii=False) if as_text else _ARGUMENTS
    call = {"name": _NAME, "arguments": arguments}
    calls = [{"id": _IDENTIFIER, "type": "function", "function": call}]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "" if empty else None, "tool_calls": calls},
        {"role": "tool", "content": "b", "tool_call_id": _IDENTIFIER, "name": _NAME},
    ]
    return {"messages": messages, "tools": [_TOOL], "add_generation_prompt": True}

"""Converts messages to the text of a prompt, with the template of an export.

A template is an untrusted program, so it runs in Jinja2's sandbox, in which it can access nothing
but its variables, with limits for the text it writes, the values it computes, and its time. The
functions for templates are those of transformers.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from configs.errors import UserError
from models.hf.folder import inside, read_json
from models.hf.messages import one_line
from serve.engine.sampling_params import RequestError

Message = dict[str, Any]
"""A dictionary with `role` and `content`."""
MAX_MESSAGES = 4096
MAX_TEXT = 1 << 23
"""Characters of a prompt, and elements of a value that a template computes."""
MAX_SECONDS = 5.0


class ChatTemplate:
    """source: Jinja2. variables: the special tokens that the template may use."""

    def __init__(self, source: str, variables: dict[str, str]) -> None:
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        environment.filters["tojson"] = _to_json
        self.template = environment.from_string(source)
        self.variables = variables

    def render(
        self,
        messages: Sequence[Message],
        mark: Callable[[str], str] = str,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt up to the start of the answer. Raises RequestError if the template fails.

        Args:
            messages: The conversation.
            mark: Applied to every text of the messages and variables.
            variables: More variables of the template.
        """
        if not messages or not all(
            isinstance(one, dict) and isinstance(one.get("role"), str) and "content" in one
            for one in messages
        ):
            raise RequestError("messages must be objects with role and content", "messages")
        if len(messages) > MAX_MESSAGES:
            raise RequestError(f"at most {MAX_MESSAGES} messages are possible", "messages")
        try:
            marked = _mark({"messages": list(messages), **(variables or {})}, mark)
            return self._render({"add_generation_prompt": True} | marked | self.variables)
        except Exception as error:  # a template can fail in any way
            raise RequestError(
                f"the chat template refuses these messages: {one_line(error)}", "messages"
            ) from None

    def _render(self, variables: dict[str, Any]) -> str:
        pieces, length = [], 0
        clock = _Clock()
        for piece in self.template.generate(variables | {_CLOCK: clock}):
            length += len(piece)
            if length > MAX_TEXT:
                raise TemplateError("it writes too much text")
            clock.check()
            pieces.append(piece)
        return "".join(pieces)


_CLOCK = "_clock"


class _Clock:
    def __init__(self) -> None:
        self.end = time.monotonic() + MAX_SECONDS

    def check(self) -> None:
        if time.monotonic() > self.end:
            raise TemplateError("it takes too long")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Limits products, powers and the time between calls."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        context.get(_CLOCK, _Clock()).check()
        sizes = [_size(left), _size(right)]
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise TemplateError(f"{operator} is not possible here")
        text = hasattr(left, "__len__") and hasattr(right, "__len__")
        if (operator == "*" and sizes[0] * sizes[1] > MAX_TEXT) or (text and sum(sizes) > MAX_TEXT):
            raise TemplateError("it computes too large a value")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        context.get(_CLOCK, _Clock()).check()
        return super().call(context, obj, *args, **kwargs)


def _size(value: Any) -> int:
    """Its elements; of an integer, the number that a product has at most."""
    if isinstance(value, int):
        return min(abs(value), MAX_TEXT + 1)
    return len(value) if hasattr(value, "__len__") else 1


def _mark(value: Any, mark: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return mark(value)
    if isinstance(value, dict):
        return {key: _mark(one, mark) for key, one in value.items()}
    return [_mark(one, mark) for one in value] if isinstance(value, list) else value


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """From `chat_template.jinja` or `tokenizer_config.json`; None if there is none."""
    config: dict[str, Any] = {}
    place = folder / "tokenizer_config.json"
    if inside(folder, place.name).exists():
        config = read_json(place)
    source = config.get("chat_template")
    own = folder / "chat_template.jinja"
    if inside(folder, own.name).exists():
        place, source = own, own.read_text(encoding="utf-8")
    if source is None:
        return None
    if isinstance(source, list):  # several, by name
        named = [one.get("template") for one in source if one.get("name") == "default"]
        source = named[0] if named else None
    if not isinstance(source, str):
        raise UserError(f"{place}: chat_template must be a text or have one named default")
    tokens = {
        name: text if isinstance(text, str) else text.get("content", "")
        for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        if isinstance(text := config.get(name), str | dict)
    }
    try:
        return ChatTemplate(source, tokens)
    except TemplateError as error:
        raise UserError(f"{place}: not a chat template: {one_line(error)}") from None


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(value: object, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)

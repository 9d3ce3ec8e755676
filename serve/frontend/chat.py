"""Converts messages to the text of a prompt, with the template of an export.

A template is an untrusted program, so it runs in Jinja2's sandbox, in which it can access nothing
but its variables. The functions for templates are those of transformers.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from configs.errors import UserError
from models.hf.folder import inside, read_json
from models.hf.messages import one_line
from serve.engine.sampling_params import RequestError

Message = dict[str, Any]
"""A dictionary with `role` and `content`."""


class ChatTemplate:
    """source: Jinja2. variables: the special tokens that the template may use."""

    def __init__(self, source: str, variables: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        environment.filters["tojson"] = _to_json
        self.template = environment.from_string(source)
        self.variables = variables

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt up to the start of the answer. Raises RequestError if the template fails."""
        if not messages or not all(
            isinstance(one, dict) and isinstance(one.get("role"), str) and "content" in one
            for one in messages
        ):
            raise RequestError("messages must be objects with role and content", "messages")
        try:
            return self.template.render(
                messages=list(messages), add_generation_prompt=True, **self.variables
            )
        except Exception as error:  # a template can fail in any way
            raise RequestError(
                f"the chat template refuses these messages: {one_line(error)}", "messages"
            ) from None


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

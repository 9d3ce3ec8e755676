"""Converts messages to the text of a prompt, with the template of an export."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.paths import read_text
from models.hf.folder import inside, read_json
from models.hf.messages import one_line, shown
from serve.engine.sampling_params import RequestError
from serve.frontend.template_process import TemplateFailed, TemplateProcess

Message = dict[str, Any]
"""A dictionary with `role` and `content`."""
MAX_MESSAGES = 4096


class ChatTemplate:
    """A template of Jinja2, rendered in a process of its own with limited memory and time.

    Args:
        source: The template.
        variables: The special tokens that it may use.
    """

    def __init__(self, source: str, variables: dict[str, str]) -> None:
        self.source = source
        self.process = TemplateProcess(source)
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
            mark: Applied to every text of the messages and variables, names included.
            variables: More variables of the template, values as in JSON.
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
            return self.process.render({"add_generation_prompt": True} | marked | self.variables)
        except (TemplateFailed, RecursionError) as error:
            raise RequestError(
                f"the chat template refuses these messages: {one_line(error)}", "messages"
            ) from None

    def try_render(self, variables: Mapping[str, Any]) -> str | None:
        """The text for variables that may not fit the template; None if it fails."""
        try:
            return self.process.render({**variables, **self.variables})
        except TemplateFailed:
            return None


def _mark(value: Any, mark: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return mark(value)
    if isinstance(value, dict):
        return {_mark(key, mark): _mark(one, mark) for key, one in value.items()}
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
        place, source = own, read_text(own)
    if source is None:
        return None
    if isinstance(source, list):  # several, by name
        named = [one for one in source if isinstance(one, dict) and one.get("name") == "default"]
        source = named[0].get("template") if named else None
    if not isinstance(source, str):
        raise UserError(f"{place}: chat_template must be a text or have one named default")
    template = ChatTemplate(source, _special_tokens(config, folder / "tokenizer_config.json"))
    try:
        template.process.start()
    except TemplateFailed as error:
        raise UserError(f"{place}: not a chat template: {one_line(error)}") from None
    return template


def _special_tokens(config: dict[str, Any], place: Path) -> dict[str, str]:
    """The texts of special tokens; each is a text or an object that has it. Raises UserError."""
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        given = config.get(name)
        content = given.get("content") if isinstance(given, dict) else given
        if isinstance(content, str):
            found[name] = content
        elif given is not None:
            raise UserError(f"{place}: {name} = {shown(given)}: must be a text")
    return found

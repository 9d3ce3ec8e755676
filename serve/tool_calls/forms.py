"""The forms in which models write calls of tools.

A form is what chat templates of a family write for a call, so it is what the model was trained to
write. Names are those of vLLM's and SGLang's parsers where these have one.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

THINK, END_THINK = "<think>", "</think>"


@dataclass(frozen=True, kw_only=True)
class Form:
    """Texts of a form. A call is `begin`, the name, `middle`, the arguments, `end`."""

    name: str
    begin: str
    middle: str
    end: str
    opens: str = ""
    """Before the first call, `closes` after the last one, and `separator` between two."""
    closes: str = ""
    separator: str = ""
    trigger: str = ""
    """After this text there is nothing but a call. Empty: after `begin`, a name and `middle`."""

    def write(self, name: str, arguments: Mapping[str, Any], identifier: str) -> str:
        """A call up to the end of its arguments."""
        return self.begin + name + self.middle + json.dumps(arguments, ensure_ascii=False)

    @property
    def marks(self) -> Iterator[str]:
        """Texts that may have special tokens."""
        yield from (self.opens, self.begin, self.middle, self.end, self.separator, self.closes)


@dataclass(frozen=True, kw_only=True)
class JsonForm(Form):
    """Arguments are a JSON object."""

    is_object: bool = False
    """Whether the whole call is an object, which ends with the first character of `end`. Other
    members may precede it."""
    identifier: str = ""
    """A text after the name that an identifier of the call follows."""

    def write(self, name: str, arguments: Mapping[str, Any], identifier: str) -> str:
        if self.identifier:
            name += self.identifier + identifier
        return super().write(name, arguments, identifier)


@dataclass(frozen=True, kw_only=True)
class XmlForm(Form):
    """Each argument is `key`, its name, `value`, its value, `value_end`. A value that is a string
    is written as it is, others as JSON."""

    key: str
    value: str
    value_end: str

    def write(self, name: str, arguments: Mapping[str, Any], identifier: str) -> str:
        found = self.begin + name + self.middle
        for key, value in arguments.items():
            is_text = isinstance(value, str)
            written = value if is_text else json.dumps(value, ensure_ascii=False)
            found += self.key + key + self.value + written + self.value_end
        return found


@dataclass(frozen=True, kw_only=True)
class HarmonyForm(Form):
    """Messages with a channel and a recipient, of gpt-oss.
    https://github.com/openai/harmony/blob/main/docs/format.md"""


def _special(name: str) -> str:
    """A token of DeepSeek, with its vertical bars and blocks instead of spaces."""
    return f"<\uff5c{name.replace(' ', chr(0x2581))}\uff5c>"


HERMES = JsonForm(
    name="hermes",
    begin='<tool_call>\n{"name": "',
    middle='", "arguments": ',
    end="}\n</tool_call>",
    separator="\n",
    trigger="<tool_call>",
    is_object=True,
)
HARMONY = HarmonyForm(
    name="harmony",
    begin=" to=functions.",
    middle="<|channel|>commentary json<|message|>",
    end="<|call|>",
)
FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        HARMONY,
        HERMES,
        XmlForm(
            name="qwen3_coder",
            begin="<tool_call>\n<function=",
            middle=">\n",
            key="<parameter=",
            value=">\n",
            value_end="\n</parameter>\n",
            end="</function>\n</tool_call>",
            separator="\n",
            trigger="<tool_call>",
        ),
        XmlForm(
            name="glm45",
            begin="<tool_call>",
            middle="\n",
            key="<arg_key>",
            value="</arg_key>\n<arg_value>",
            value_end="</arg_value>\n",
            end="</tool_call>",
            separator="\n",
            trigger="<tool_call>",
        ),
        XmlForm(
            name="glm47",
            begin="<tool_call>",
            middle="",
            key="<arg_key>",
            value="</arg_key><arg_value>",
            value_end="</arg_value>",
            end="</tool_call>",
            trigger="<tool_call>",
        ),
        JsonForm(
            name="deepseek_v3",
            opens=_special("tool calls begin"),
            begin=f"{_special('tool call begin')}function{_special('tool sep')}",
            middle="\n```json\n",
            end=f"\n```{_special('tool call end')}",
            separator="\n",
            closes=_special("tool calls end"),
            trigger=_special("tool calls begin"),
        ),
        JsonForm(
            name="deepseek_v31",
            opens=_special("tool calls begin"),
            begin=_special("tool call begin"),
            middle=_special("tool sep"),
            end=_special("tool call end"),
            closes=_special("tool calls end"),
            trigger=_special("tool calls begin"),
        ),
        JsonForm(
            name="mistral",
            opens="[TOOL_CALLS][",
            begin='{"name": "',
            middle='", "arguments": ',
            end="}",
            separator=", ",
            closes="]",
            trigger="[TOOL_CALLS]",
            is_object=True,
        ),
        JsonForm(
            name="mistral_args",
            begin="[TOOL_CALLS]",
            middle="[ARGS]",
            end="",
            trigger="[TOOL_CALLS]",
        ),
        JsonForm(
            name="mistral_call_id",
            begin="[TOOL_CALLS]",
            middle="[ARGS]",
            end="",
            trigger="[TOOL_CALLS]",
            identifier="[CALL_ID]",
        ),
        JsonForm(
            name="llama_json",
            begin='{"name": "',
            middle='", "parameters": ',
            end="}",
            is_object=True,
        ),
    )
}

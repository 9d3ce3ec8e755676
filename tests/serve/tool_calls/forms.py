"""A reply with calls as the chat templates of the model families write it, copied from what these
templates rendered (scripts/check_clients/tool_calls.py runs them)."""

from typing import Any

from serve.tool_calls.structure import Tool

TOOLS = [
    Tool("add", {"type": "object", "properties": {
        "a": {"type": "integer"}, "s": {"type": "string"}, "o": {"type": ["object", "null"]}},
        "required": ["a", "s"]}),
    Tool("stop", {"type": "object", "properties": {}}),
    Tool("add.more", {"type": "object"}),
]  # fmt: skip
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("add", {"a": 1, "s": "x\ny\"é🙂<b>' </ "}),
    ("stop", {}),
    ("add", {"a": -2, "s": "", "o": {"k}": [True, None]}}),
]
_FIRST = '{"a": 1, "s": "x\\ny\\"é🙂<b>\' </ "}'
_LAST = '{"a": -2, "s": "", "o": {"k}": [true, null]}}'


def _deepseek(text: str) -> str:
    """`<tool sep>` and the like, in DeepSeek's characters."""
    for name in ("tool calls begin", "tool calls end", "tool call begin", "tool call end",
                 "tool sep"):  # fmt: skip
        own = name.replace(" ", "\u2581")
        text = text.replace(f"<{name}>", f"<\uff5c{own}\uff5c>")
    return text


WRITTEN = {
    "hermes": (
        f'<tool_call>\n{{"name": "add", "arguments": {_FIRST}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>\n'
        f'<tool_call>\n{{"name": "add", "arguments": {_LAST}}}\n</tool_call>'
    ),
    "qwen3_coder": (
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=s>\n"
        "x\ny\"é🙂<b>' </ \n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=stop>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=add>\n<parameter=a>\n-2\n</parameter>\n<parameter=s>\n\n"
        '</parameter>\n<parameter=o>\n{"k}": [true, null]}\n</parameter>\n</function>\n</tool_call>'
    ),
    "glm45": (
        "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n<arg_key>s</arg_key>\n"
        "<arg_value>x\ny\"é🙂<b>' </ </arg_value>\n</tool_call>\n<tool_call>stop\n</tool_call>\n"
        "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>-2</arg_value>\n<arg_key>s</arg_key>\n"
        '<arg_value></arg_value>\n<arg_key>o</arg_key>\n<arg_value>{"k}": [true, null]}'
        "</arg_value>\n</tool_call>"
    ),
    "glm47": (
        "<tool_call>add<arg_key>a</arg_key><arg_value>1</arg_value><arg_key>s</arg_key>"
        "<arg_value>x\ny\"é🙂<b>' </ </arg_value></tool_call><tool_call>stop</tool_call>"
        "<tool_call>add<arg_key>a</arg_key><arg_value>-2</arg_value><arg_key>s</arg_key>"
        '<arg_value></arg_value><arg_key>o</arg_key><arg_value>{"k}": [true, null]}</arg_value>'
        "</tool_call>"
    ),
    "deepseek_v3": _deepseek(
        "<tool calls begin><tool call begin>function<tool sep>add\n```json\n"
        f"{_FIRST}\n```<tool call end>\n<tool call begin>function<tool sep>stop\n```json\n{{}}\n"
        f"```<tool call end>\n<tool call begin>function<tool sep>add\n```json\n{_LAST}\n"
        "```<tool call end><tool calls end>"
    ),
    "deepseek_v31": _deepseek(
        f"<tool calls begin><tool call begin>add<tool sep>{_FIRST}<tool call end>"
        f"<tool call begin>stop<tool sep>{{}}<tool call end><tool call begin>add<tool sep>{_LAST}"
        "<tool call end><tool calls end>"
    ),
    "mistral": (
        f'[TOOL_CALLS][{{"name": "add", "arguments": {_FIRST}}}, '
        f'{{"name": "stop", "arguments": {{}}}}, {{"name": "add", "arguments": {_LAST}}}]'
    ),
    "mistral_args": (
        f"[TOOL_CALLS]add[ARGS]{_FIRST}[TOOL_CALLS]stop[ARGS]{{}}[TOOL_CALLS]add[ARGS]{_LAST}"
    ),
    "mistral_call_id": (
        f"[TOOL_CALLS]add[CALL_ID]abcdefgh1[ARGS]{_FIRST}[TOOL_CALLS]stop[CALL_ID]abcdefgh2[ARGS]"
        f"{{}}[TOOL_CALLS]add[CALL_ID]abcdefgh3[ARGS]{_LAST}"
    ),
    "llama_json": f'{{"name": "add", "parameters": {_FIRST}}}',
    "harmony": f" to=functions.add<|channel|>commentary json<|message|>{_FIRST}<|call|>",
}
SINGLE = ("llama_json", "harmony")
"""Forms of one call per reply."""
REASONING = {"harmony": "<|channel|>analysis<|message|>Well < so.<|end|><|start|>assistant"}
MARKS = (
    "<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<|start|>", "<|end|>", "<|call|>",
    "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>",
    *(_deepseek(f"<{name}>") for name in ("tool calls begin", "tool calls end",
                                          "tool call begin", "tool call end", "tool sep")),
)  # fmt: skip

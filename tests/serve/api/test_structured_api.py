"""Structured output over HTTP: the fields of OpenAI, SGLang and vLLM, streamed or not; tools."""

import json
import random
import re
from typing import TYPE_CHECKING, Any

import httpx
import jsonschema
import pytest

from serve.api.tools import MessageParser
from serve.tool_calls.forms import HERMES
from serve.tool_calls.structure import Tool
from tests.serve.conftest import RunningServer
from tests.serve.grammar.conftest import PERSON

if TYPE_CHECKING:
    import openai  # takes a second, which only the tests with a client need

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
TOOLS: Any = [
    {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {
        "type": "object", "properties": {"a": {"type": "integer", "maximum": 99, "minimum": 0},
            "text": {"type": "string", "maxLength": 4}}, "required": ["a", "text"]}}},
    {"type": "function", "function": {"name": "stop"}},
]  # fmt: skip


def test_response_format(client: "openai.OpenAI") -> None:
    options: Any = {"model": "tiny", "messages": HELLO, "seed": 3, "response_format": FORMAT}
    whole = client.chat.completions.create(**options, n=2, max_tokens=120)
    for choice in whole.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), PERSON)
    pieces = ["", ""]
    for chunk in client.chat.completions.create(**options, n=2, max_tokens=120, stream=True):
        for one in chunk.choices:
            pieces[one.index] += one.delta.content or ""
    assert pieces == [choice.message.content for choice in whole.choices]


def test_json_object(client: "openai.OpenAI") -> None:
    found = client.chat.completions.create(
        model="tiny", messages=HELLO, seed=3, response_format={"type": "json_object"}, n=8,
        max_tokens=120,
    )  # fmt: skip
    ended = [one for one in found.choices if one.finish_reason == "stop"]
    assert ended
    for choice in ended:
        assert isinstance(json.loads(choice.message.content or ""), dict)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"regex": "[a-c]{4}"}, "[a-c]{4}"),
        ({"guided_regex": "[a-c]{4}"}, "[a-c]{4}"),
        ({"guided_choice": ["red", "green"]}, "red|green"),
        ({"guided_grammar": 'root ::= "a" | "b"'}, "a|b"),
        ({"guided_json": {"type": "boolean"}}, "true|false"),
        ({"structured_outputs": {"choice": ["x", "y"]}}, "x|y"),
        ({"structured_outputs": {"json": {"enum": [1, 2]}, "regex": None}}, "1|2"),
        ({"ebnf": 'root ::= "a" root | "b"', "max_tokens": 99, "logit_bias": {}}, "a*b?"),
        ({"response_format": {"type": "text"}, "regex": "q"}, "q"),
    ],
)
def test_completions(server: RunningServer, fields: dict[str, Any], pattern: str) -> None:
    body = {"prompt": "x", "seed": 1, "max_tokens": 20} | fields
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    assert re.fullmatch(pattern, answer["choices"][0]["text"]), answer


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"regex": "[a-c]{4}"}, "[a-c]{4}"),
        ({"json_schema": json.dumps({"enum": ["a", "b"]})}, '"a"|"b"'),
        ({"ebnf": 'root ::= "a" | "b"'}, "a|b"),
        (
            {"structural_tag": json.dumps({"type": "structural_tag", "format": {
                "type": "const_string", "value": "fixed text"}})},
            "fixed text",
        ),
    ],
)  # fmt: skip
def test_sglang(server: RunningServer, fields: dict[str, Any], pattern: str, stream: bool) -> None:
    params = {"max_new_tokens": 30, "sampling_seed": 2} | fields
    body = {"text": "x", "sampling_params": params, "stream": stream}
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=60)
    found = [json.loads(one[6:]) for one in answer.text.split("\n\n") if one.startswith("data: {")]
    last = found[-1] if stream else answer.json()
    assert re.fullmatch(pattern, last["text"]) and last["meta_info"]["finish_reason"]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("generate", {"text": "x", "regex": "a"}),
        ("v1/completions", {"prompt": "x", "tools": TOOLS}),
        ("v1/completions", {"prompt": "x", "response_format": {"type": "xml"}}),
        ("v1/completions", {"prompt": "x", "response_format": FORMAT, "regex": "a"}),
        ("v1/completions", {"prompt": "x", "structured_outputs": {"lark": "a"}}),
        ("v1/chat/completions", {"messages": HELLO, "tools": TOOLS, "response_format": FORMAT}),
        ("v1/chat/completions", {"messages": HELLO, "tool_choice": "required"}),
        ("v1/chat/completions", {"messages": HELLO, "tools": TOOLS, "tool_choice": {
            "type": "function", "function": {"name": "other"}}}),
        ("v1/chat/completions", {"messages": HELLO, "tools": [TOOLS[0], TOOLS[0]]}),
        ("v1/chat/completions", {"messages": HELLO, "tools": [{"type": "function", "function": {
            "name": "a b"}}]}),
    ],
)  # fmt: skip
def test_refused(server: RunningServer, path: str, fields: dict[str, Any]) -> None:
    answer = httpx.post(f"{server.url}/{path}", json=fields, timeout=60)
    assert answer.status_code == 400 and "\n" not in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ("required", "tool_calls"),
        ({"type": "function", "function": {"name": "add"}}, "stop"),
    ],
)
def test_tools(client: "openai.OpenAI", choice: Any, reason: str) -> None:
    options: Any = {
        "model": "tiny", "messages": HELLO, "tools": TOOLS, "tool_choice": choice, "seed": 1,
        "max_tokens": 110, "parallel_tool_calls": False,
    }  # fmt: skip
    whole = client.chat.completions.create(**options).choices[0]
    assert whole.finish_reason == reason and not whole.message.content
    (call,) = whole.message.tool_calls or []
    names = [tool["function"]["name"] for tool in TOOLS]
    assert call.type == "function" and call.function.name in names
    if reason == "stop":
        assert call.function.name == "add"
    schema = TOOLS[names.index(call.function.name)]["function"].get(
        "parameters", {"maxProperties": 0}
    )
    jsonschema.validate(json.loads(call.function.arguments), schema)
    name, arguments, ids = "", "", []
    for chunk in client.chat.completions.create(**options, stream=True):
        for one in chunk.choices[0].delta.tool_calls or []:
            assert one.index == 0 and one.function is not None
            ids += [one.id] if one.id else []
            name += one.function.name or ""
            arguments += one.function.arguments or ""
        if chunk.choices[0].finish_reason:
            assert chunk.choices[0].finish_reason == reason
    assert (name, arguments) == (call.function.name, call.function.arguments)
    assert len(ids) == 1 and ids[0].startswith("call_")


def test_tools_that_need_not_be_called(client: "openai.OpenAI") -> None:
    """`auto` leaves the text to the model; `none` is as without tools."""
    options: Any = {"model": "tiny", "messages": HELLO, "tools": TOOLS, "seed": 1, "max_tokens": 40}
    for choice in ("auto", "none"):
        one = client.chat.completions.create(**options, tool_choice=choice).choices[0]
        assert one.message.content and not one.message.tool_calls
        assert one.finish_reason in ("length", "stop")


CALLS = (
    'First.\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "t": "<tool_call> \t}"}}\n'
    '</tool_call>\n<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
)


@pytest.mark.parametrize("seed", range(20))
def test_calls_are_divided_wherever_pieces_end(seed: int) -> None:
    tools = [Tool(name, {}) for name in ("add", "stop")]
    rng, parser, left = random.Random(seed), MessageParser(HERMES, tools), CALLS
    content, calls = "", [["", ""], ["", ""]]
    while left:
        size = rng.randint(1, 40) if seed else len(left)
        piece, left = left[:size], left[size:]
        delta = parser.add(piece, not left)
        content += delta.get("content", "")
        for one in delta.get("tool_calls", []):
            calls[one["index"]][0] += one["function"].get("name", "")
            calls[one["index"]][1] += one["function"]["arguments"]
    assert content == "First." == "".join(parser.content)
    assert calls == [["add", '{"a": 1, "t": "<tool_call> \\u0009}"}'], ["stop", "{}"]]
    assert [call["function"]["arguments"] for call in parser.calls] == [one[1] for one in calls]
    assert parser.finish_reason("stop") == "tool_calls"


def test_metrics(server: RunningServer) -> None:
    def read() -> dict[str, float]:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name.split("{")[0]: float(value) for name, value in pairs}

    body = {"prompt": "x", "regex": "(a|b) and then forced text to the end", "max_tokens": 60}
    before = read()
    for _ in range(2):
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    after = read()
    added = {
        name: after[name] - before[name] for name in after if "grammar" in name or "jump" in name
    }
    assert added["sglang:num_jump_forward_tokens_total"] > 10
    assert added["sglang:num_grammar_total"] == 1
    assert added["sglang:num_grammar_cache_hit_total"] == 1

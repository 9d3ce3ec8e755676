"""What templates write is divided into the calls that they wrote, wherever pieces end."""

import json
import random

import pytest

from serve.api.tools import MessageParser
from serve.tool_calls.forms import FORMS
from serve.tool_calls.reasoning import ReasoningParser
from serve.tool_calls.structure import Tool
from tests.serve.tool_calls.forms import CALLS, REASONING, SINGLE, TOOLS, WRITTEN


def parse(parser: MessageParser, text: str, rng: random.Random) -> MessageParser:
    """Adds a text in random pieces; the deltas must add up to the message."""
    calls: list[list[str]] = []
    content = reasoning = ""
    while True:
        size = rng.choice([1, 2, 5, 30, len(text) + 1])
        piece, text = text[:size], text[size:]
        delta = parser.add(piece, not text)
        content += delta.get("content", "")
        reasoning += delta.get("reasoning_content", "")
        for one in delta.get("tool_calls", []):
            if one["index"] == len(calls):
                assert one["id"].startswith("call_") and one["type"] == "function"
                calls.append([one["function"]["name"], ""])
            calls[one["index"]][1] += one["function"]["arguments"]
        if not text:
            break
    message = parser.message()
    assert (message["content"] or "") == content
    assert message.get("reasoning_content", "") == reasoning
    own = [one["function"] for one in message.get("tool_calls", [])]
    assert [[one["name"], one["arguments"]] for one in own] == calls
    return parser


def read_calls(parser: MessageParser) -> list[tuple[str, object]]:
    found = [call["function"] for call in parser.calls]
    return [(one["name"], json.loads(one["arguments"])) for one in found]


@pytest.mark.parametrize("name", FORMS)
def test_round_trip(name: str) -> None:
    expected = CALLS[:1] if name in SINGLE else CALLS
    for seed in range(40):
        for content in ("", "Hi.", "1 < 2 {[ é", "\n a\n\nb"):
            rng = random.Random(seed)
            before = content
            if name == "harmony":
                before = f"<|channel|>commentary<|message|>{content}<|end|><|start|>assistant"
            elif content:
                before += "\n" * rng.randint(0, 2)
            parser = parse(MessageParser(FORMS[name], TOOLS), before + WRITTEN[name], rng)
            assert read_calls(parser) == expected
            assert "".join(parser.content) == content
            assert parser.finish_reason("stop") == "tool_calls"


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("is_open", [False, True])
def test_reasoning(name: str, is_open: bool) -> None:
    text = "" if is_open else "\n<think>\n"
    text = REASONING.get(name) or f"{text}Well < so.\n</think>\n\n"
    for seed in range(20):
        own = None if name == "harmony" else ReasoningParser(is_open)
        parser = MessageParser(FORMS[name], TOOLS, False, own)
        parse(parser, text + WRITTEN[name], random.Random(seed))
        assert "".join(parser.reasoning) == "Well < so."
        assert not parser.content
        assert read_calls(parser) == (CALLS[:1] if name in SINGLE else CALLS)


@pytest.mark.parametrize("name", [name for name in FORMS if name != "harmony"])
def test_no_text_is_lost(name: str) -> None:
    """Texts that are no calls of the tools, and cut ones, are content; what a call has is not."""
    form = FORMS[name]
    written = form.write("add", {"a": 1}, "abcdefgh1")
    for text in (
        form.opens + form.begin + "unknown" + form.middle + '{"a": 1}' + form.end,
        form.opens + form.begin + "add and more",
        form.opens[:3] + form.begin[:4],
        "a" + form.begin * 2 + " ",
        form.begin + "x" * 100 + "\n",
        form.begin + " " * 40 + "add",
        "\n\n", "<", "{", "[TOOL",
    ):  # fmt: skip
        for seed in range(6):
            parser = parse(MessageParser(form, TOOLS), text, random.Random(seed))
            assert "".join(parser.content) == text and not parser.calls
    for size in range(len(form.opens + written)):
        text = "Hi" + (form.opens + written)[:size]
        parser = parse(MessageParser(form, TOOLS), text, random.Random(size))
        if parser.calls:
            assert '{"a": 1}'.startswith(parser.calls[0]["function"]["arguments"])
            assert "".join(parser.content) == "Hi"
        else:
            assert "".join(parser.content) == text


def test_text_without_the_format_of_harmony_is_content() -> None:
    for text in ("plain <|channel", "assist", " to be", "a <b>"):
        parser = parse(MessageParser(FORMS["harmony"], TOOLS), text + "!", random.Random(0))
        assert "".join(parser.content) == text + "!"
    final = "<|channel|>final<|message|>Yes"
    parser = parse(MessageParser(FORMS["harmony"]), REASONING["harmony"] + final, random.Random(0))
    assert ("".join(parser.content), "".join(parser.reasoning)) == ("Yes", "Well < so.")


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<think>a</think>b", "a", "b"),
        ("<thin", "", "<thin"),
        ("b <think>a</think>", "", "b <think>a</think>"),
        ("<think>a\n\nb", "a\n\nb", ""),
        ("<think>\n\n</think>\n\nb\n", "", "b\n"),
        ("<think>a</think", "a</think", ""),
        ("", "", ""),
    ],
)
def test_reasoning_of_all_lengths(text: str, reasoning: str, content: str) -> None:
    for seed in range(10):
        parser = MessageParser(FORMS["hermes"], (), False, ReasoningParser(False))
        parse(parser, text, random.Random(seed))
        assert ("".join(parser.reasoning), "".join(parser.content)) == (reasoning, content)


def test_values_of_elements_have_the_types_of_the_schema() -> None:
    properties = {
        "text": {"type": "string"}, "number": {"type": "number"}, "other": {},
        "name": {"$ref": "#/$defs/Name"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    }  # fmt: skip
    schema = {"properties": properties, "$defs": {"Name": {"enum": ["1", "true"]}}}
    form = FORMS["glm45"]
    for written, expected in (
        ({"text": "12", "name": "1"}, {"text": "12", "name": "1"}),
        ({"number": "1e3", "other": "[1]"}, {"number": 1000.0, "other": [1]}),
        ({"other": "a b", "maybe": "null"}, {"other": "a b", "maybe": None}),
        ({"number": "NaN", "other": '"q"'}, {"number": "NaN", "other": '"q"'}),
        ({"number": "True", "unlisted": "x"}, {"number": True, "unlisted": "x"}),
    ):
        text = form.write("f", written, "") + form.end
        parser = parse(MessageParser(form, [Tool("f", schema)]), text, random.Random(1))
        assert read_calls(parser) == [("f", expected)]

"""Calls over HTTP by a model whose tokenizer has the marks of its form as special tokens."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
from tokenizers import Tokenizer

from serve.engine.core import EngineCore, EngineOptions
from serve.engine.loading import open_export
from serve.frontend.chat import ChatTemplate
from tests.serve.conftest import run_server

if TYPE_CHECKING:
    import openai  # takes a second, which only the tests with a client need

pytestmark = pytest.mark.slow
MARKS = ["[TOOL_CALLS]", "[ARGS]", "<think>", "</think>", "<|start|>", "<|end|>", "<|channel|>",
         "<|message|>", "<|call|>", "<|constrain|>"]  # fmt: skip
MISTRAL = (
    "{% for m in messages %}{{ m.role }}: {{ m.content or '' }}"
    "{% for c in m.tool_calls %}[TOOL_CALLS]{{ c.function.name }}[ARGS]"
    "{{ c.function.arguments|tojson(ensure_ascii=False) }}{% endfor %}\n{% endfor %}"
    "{% if tag is defined %}{{ tag }}{% endif %}assistant:<think>{# </think> #}"
)
HARMONY = (
    "{% generation %}{% endgeneration %}{% for m in messages %}<|start|>{{ m.role }}<|message|>"
    "{{ m.content }}<|end|>{% endfor %}<|start|>assistant{# <|channel|> #}"
)
PARAMETERS: dict[str, Any] = {
    "type": "object", "required": ["a", "b"], "additionalProperties": False, "properties": {
        "a": {"type": "integer", "minimum": 0, "maximum": 99},
        "b": {"enum": ["[ARGS]", "é\n", '"']}},
}  # fmt: skip
OPTIONS: dict[str, Any] = {
    "model": "tiny", "messages": [{"role": "user", "content": "[ARGS] <think> Hi"}], "seed": 5,
    "max_tokens": 44, "n": 2,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}],
}  # fmt: skip


@pytest.fixture(scope="module", params=[MISTRAL, HARMONY], ids=["mistral", "harmony"])
def client(
    request: pytest.FixtureRequest, export_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator["openai.OpenAI"]:
    import openai

    folder = tmp_path_factory.mktemp("marked")
    for path in export_folder.iterdir():
        (folder / path.name).hardlink_to(path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(MARKS)
    (folder / "tokenizer.json").unlink()
    tokenizer.save(str(folder / "tokenizer.json"))
    core = EngineCore(open_export(folder, device="cpu"), EngineOptions(kv_tokens=4096))
    with run_server(core, template=ChatTemplate(request.param, {})) as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def streamed(client: "openai.OpenAI", options: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages that the deltas add up to."""
    found: list[dict[str, Any]] = [{"content": "", "reasoning": "", "calls": []} for _ in range(2)]
    for chunk in client.chat.completions.create(**options, stream=True):
        for choice in chunk.choices:
            own, delta = found[choice.index], choice.delta
            own["content"] += delta.content or ""
            own["reasoning"] += getattr(delta, "reasoning_content", None) or ""
            for call in delta.tool_calls or []:
                assert call.function is not None
                if call.index == len(own["calls"]):
                    own["calls"].append([call.function.name, ""])
                own["calls"][call.index][1] += call.function.arguments or ""
            own["reason"] = choice.finish_reason or own.get("reason")
    return found


@pytest.mark.parametrize("choice", ["required", "auto"])
def test_calls(client: "openai.OpenAI", choice: Any) -> None:
    # a random model does not end its reasoning by itself
    end = {"logit_bias": {"303": 100, "305": 100}} if choice != "auto" else {}
    options = OPTIONS | {"tool_choice": choice} | end
    whole = client.chat.completions.create(**options)
    messages = streamed(client, options)
    for one, own in zip(whole.choices, messages, strict=True):
        calls = [[c.function.name, c.function.arguments] for c in one.message.tool_calls or []]
        reasoning = getattr(one.message, "reasoning_content", None) or ""
        assert own["calls"] == calls and own["content"] == (one.message.content or "")
        assert own["reasoning"] == reasoning and own["reason"] == one.finish_reason
        assert not any(mark in own["content"] + reasoning for mark in MARKS[:2] + MARKS[4:])
        if choice != "auto":
            assert not own["content"]
        if one.finish_reason in ("tool_calls", "stop"):
            for name, arguments in calls:
                assert name == "f"
                jsonschema.validate(json.loads(arguments), PARAMETERS)
    assert choice == "auto" or any(own["calls"] for own in messages)


def test_a_grammar_follows_the_reasoning(client: "openai.OpenAI") -> None:
    options = {key: value for key, value in OPTIONS.items() if key != "tools"}
    options["logit_bias"] = {"303": 100, "305": 100}
    options["extra_body"] = {"guided_choice": ["red", "green"]}
    for one in client.chat.completions.create(**options).choices:
        if one.finish_reason == "stop":
            assert one.message.content in ("red", "green")
    options["extra_body"] |= {"separate_reasoning": False}
    for one in client.chat.completions.create(**options).choices:
        if one.finish_reason == "stop":
            assert (one.message.content or "").endswith(("red", "green"))


def test_an_earlier_call_is_text_of_the_template(client: "openai.OpenAI") -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "é"}'}}
    messages: Any = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "why"},
        {"role": "tool", "content": "y", "tool_call_id": "1"},
    ]
    found = client.chat.completions.create(model="tiny", messages=messages, max_tokens=1)
    assert found.usage is not None and found.usage.prompt_tokens > 10

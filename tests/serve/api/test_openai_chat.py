"""Chats with the official client; the reference is a completion of the rendered conversation."""

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from tokenizers import Tokenizer

from tests.serve.conftest import RunningServer

if TYPE_CHECKING:
    import openai  # takes a second, which only the tests with a client need

Greedy = Callable[[Sequence[int], int], list[int]]
GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}
HELLO: list[Any] = [{"role": "user", "content": "Hello 日本"}]


def rendered(tokenizer: Tokenizer, turns: Sequence[tuple[str, str]], tail: str = "") -> list[int]:
    """The tokens of the template of the test server; texts of users are never special."""
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = True
    tokens: list[int] = []
    for i, (role, content) in enumerate(turns):
        last = f"{tail}assistant:" if i + 1 == len(turns) else ""
        text = f"{role}: {content}\n{last}"
        tokens += [0, *plain.encode(text, add_special_tokens=False).ids]
    return tokens


@pytest.mark.parametrize(
    "messages",
    [
        HELLO,
        [{"role": "system", "content": "Be"}, {"role": "user", "content": "a<|endoftext|>b"}],
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {"role": "assistant", "content": "c"},
            {"role": "tool", "content": "d", "tool_call_id": "1"},
        ],
    ],
)
def test_chat_equals_the_model_on_the_rendered_text(
    client: "openai.OpenAI", tokenizer: Tokenizer, greedy_reference: Greedy, messages: list[Any]
) -> None:
    turns = []
    for one in messages:
        parts = one["content"]
        content = parts if isinstance(parts, str) else "".join(p["text"] for p in parts)
        turns.append((one["role"], content))
    prompt = rendered(tokenizer, turns)
    expected = greedy_reference(prompt, 12)
    found = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=12, **GREEDY
    )
    assert found.choices[0].message.content == tokenizer.decode(expected)
    assert found.choices[0].message.role == "assistant"
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(prompt), 12)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"n": 3, "seed": 7, "temperature": 1.0},
        {"stop": ["e", "zz"], "temperature": 0.9, "seed": 1},
        {"logprobs": True, "top_logprobs": 3},
        {"extra_body": {"return_token_ids": True, "ignore_eos": True}, "stop": ["zz"], "n": 2},
    ],
)
def test_streams_equal_whole_answers(client: "openai.OpenAI", extra: dict[str, Any]) -> None:
    call: dict[str, Any] = {
        "model": "tiny",
        "messages": HELLO,
        "max_tokens": 16,
        "temperature": 0.0,
    }
    call |= extra
    whole = client.chat.completions.create(**call)
    chunks = list(
        client.chat.completions.create(**call, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert mine[0].delta.role == "assistant" and not any(c.delta.role for c in mine[1:])
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert [c.finish_reason for c in mine if c.finish_reason] == [choice.finish_reason]
        if choice.logprobs is not None:
            listed = [e for c in mine if c.logprobs for e in c.logprobs.content or []]
            assert [e.token for e in listed] == [e.token for e in choice.logprobs.content or []]
        if "extra_body" in extra:  # pieces of characters are no text yet, but have their ids
            ids = [token for c in mine for token in getattr(c, "token_ids", [])]
            assert ids == choice.token_ids and len(ids) == 16


def test_logprobs_have_bytes_and_the_sampled_token(client: "openai.OpenAI") -> None:
    found = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=40, seed=2, logprobs=True, top_logprobs=2,
        extra_body={"ignore_eos": True, "skip_special_tokens": False},
    ).choices[0]  # fmt: skip
    assert found.logprobs is not None and found.logprobs.content is not None
    entries = found.logprobs.content
    assert len(entries) == 40
    joined = b"".join(bytes(entry.bytes or []) for entry in entries)
    assert joined.decode(errors="replace") == found.message.content
    for entry in entries:
        assert entry.token in [top.token for top in entry.top_logprobs]
        assert 2 <= len(entry.top_logprobs) <= 3


def test_answers_fill_the_context_by_default(client: "openai.OpenAI") -> None:
    found = client.chat.completions.create(model="tiny", messages=HELLO, **GREEDY)
    assert found.usage is not None and found.usage.total_tokens == 192


def test_variables_of_the_template(client: "openai.OpenAI", tokenizer: Tokenizer) -> None:
    found = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=1,
        extra_body={"chat_template_kwargs": {"tag": "<|endoftext|>!"}},
    )  # fmt: skip
    tokens = rendered(tokenizer, [("user", "Hello 日本")], "<|endoftext|>!")
    assert found.usage is not None and found.usage.prompt_tokens == len(tokens)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [5]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "<|endoftext|>", "content": "a"}]}, "messages"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a" * 100_000}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a"}] * 5000}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [5]}]}, "messages"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"max_completion_tokens": 10**9}, "max_completion_tokens"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ],
)
def test_bad_chats(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    body = {"messages": HELLO, "max_tokens": 1} | fields
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=json.dumps(body).encode())
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param

"""OpenAI's client, synchronous, asynchronous and streaming: `python with_openai.py URL MODEL OUT`.

It writes a list of `[check, result, ok]`. Every case of `COMPLETIONS` and `CHATS` is sent three
times: sync, async, and as a stream whose pieces are joined. Seeded answers have to be the same.
"""

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai

USER = [{"role": "user", "content": "Say something about numbers."}]
ROLES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"x": 2}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "a", "content": "4"},
    {"role": "user", "content": "Sure?"},
]
SCHEMA = {
    "type": "object",
    "properties": {"done": {"type": "boolean"}, "color": {"enum": ["red", "green"]}},
    "required": ["done", "color"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": SCHEMA}}
    for name in ("paint", "clean")
]
COMMON: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.3},
    "top_p": {"top_p": 0.5},
    "n": {"n": 3},
    "stop, 64 strings": {"stop": [f"never {i}" for i in range(64)]},
    "stop, one string": {"stop": "e"},
    "logit_bias": {"logit_bias": {"35": 100}},
    "penalties": {"presence_penalty": 1.5, "frequency_penalty": -0.5},
    "user": {"user": "someone"},
    "extra_body": {"extra_body": {"min_tokens": 4, "ignore_eos": True, "top_k": 20}},
}
COMPLETIONS: dict[str, dict[str, Any]] = {
    "prompt: text": {"prompt": "def f(x):"},
    "prompt: texts": {"prompt": ["def f(x):", "class A:"]},
    "prompt: ids": {"prompt": [100, 200, 300]},
    "prompt: lists of ids": {"prompt": [[100, 200], [300]]},
    "echo, logprobs": {"prompt": "def f(x):", "echo": True, "logprobs": 2},
    "logprobs 0": {"prompt": "def f(x):", "logprobs": 0},
    "max_tokens 0, echo": {"prompt": "def f(x):", "echo": True, "logprobs": 1, "max_tokens": 0},
}
COMPLETIONS |= {name: {"prompt": "def f(x):", **case} for name, case in COMMON.items()}
CHATS: dict[str, dict[str, Any]] = {
    "roles, parts": {"messages": ROLES},
    "max_completion_tokens": {"max_completion_tokens": 5},
    "logprobs, top_logprobs": {"logprobs": True, "top_logprobs": 5},
    "metadata, store": {"metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
    "json_object": {"response_format": {"type": "json_object"}},
    "json_schema": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "paint", "schema": SCHEMA, "strict": True},
        },
        "max_tokens": 64,
    },
    "tools, required": {"tools": TOOLS, "tool_choice": "required", "max_tokens": 96},
    "tools, a function": {
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "clean"}},
        "max_tokens": 96,
    },
    "tools, auto": {"tools": TOOLS, "tool_choice": "auto"},
    "tools, none": {"tools": TOOLS, "tool_choice": "none"},
    "tools, one call": {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False,
                        "max_tokens": 96},
}  # fmt: skip
CHATS |= COMMON


def plain(answer: Any) -> list[Any]:
    """What must be equal in all three ways, by choice: text, reason, calls, tokens' logprobs."""
    found = []
    for choice in sorted(answer.choices, key=lambda one: one.index):
        message = getattr(choice, "message", None)
        calls = [
            (call.function.name, call.function.arguments)
            for call in (message and message.tool_calls) or []
        ]
        text = choice.text if message is None else message.content
        found.append([text or "", choice.finish_reason, calls, _logprobs(choice)])
    return found


def _logprobs(choice: Any) -> list[float]:
    found = choice.logprobs
    if found is None:
        return []
    if hasattr(found, "token_logprobs"):
        return [value for value in found.token_logprobs or [] if value is not None]
    return [one.logprob for one in found.content or []]


def joined(chunks: list[Any]) -> list[Any]:
    """The same from a stream; asserts its form."""
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens > 0
    assert all(chunk.usage is None and chunk.choices for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    found: dict[int, list[Any]] = {}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        row = found.setdefault(choice.index, ["", None, [], []])
        assert row[1] is None, "a choice continues after its finish_reason"
        delta = getattr(choice, "delta", None)
        row[0] += (choice.text if delta is None else delta.content) or ""
        row[1] = choice.finish_reason
        for call in (delta and delta.tool_calls) or []:
            while len(row[2]) <= call.index:
                row[2].append(("", ""))
            name, arguments = row[2][call.index]
            row[2][call.index] = (
                name + (call.function.name or ""), arguments + (call.function.arguments or "")
            )  # fmt: skip
        row[3] += _logprobs(choice)
    return [found[index] for index in sorted(found)]


def differs(first: list[Any], second: list[Any]) -> str:
    """How two answers differ; empty if they do not."""
    if len(first) != len(second):
        return f"{len(first)} and {len(second)} choices"
    for a, b in zip(first, second, strict=True):
        if a[:3] != b[:3]:
            return f"{a[:3]!r} and {b[:3]!r}"
        if len(a[3]) != len(b[3]) or any(
            abs(x - y) > 1e-3 for x, y in zip(a[3], b[3], strict=True)
        ):
            return f"log-probabilities {a[3]} and {b[3]}"
    return ""


async def three_ways(make: Any, make_async: Any, case: dict[str, Any]) -> str:
    """What is wrong; empty if the three answers are the same."""
    case = {"seed": 7, "max_tokens": 12} | case
    if "max_completion_tokens" in case:
        del case["max_tokens"]
    answer = make(**case)
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    asked, again = plain(answer), plain(await make_async(**case))
    if wrong := differs(asked, again):
        return f"async differs: {wrong}"
    options = {"stream": True, "stream_options": {"include_usage": True}}
    stream = list(make(**case, **options))
    if wrong := differs(asked, joined(stream)):
        return f"the stream differs: {wrong}"
    if stream[-1].usage.total_tokens != usage.total_tokens:
        return "the stream's usage differs"
    async_stream = [chunk async for chunk in await make_async(**case, **options)]
    if wrong := differs(asked, joined(async_stream)):
        return f"the async stream differs: {wrong}"
    return _as_specified(case, asked)


def _as_specified(case: dict[str, Any], found: list[Any]) -> str:
    prompt = case.get("prompt")
    n_prompts = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    if len(found) != case.get("n", 1) * n_prompts:
        return f"{len(found)} choices"
    if "logit_bias" in case and len(set(found[0][0])) > 4:
        return f"a bias of 100 gives {found[0][0]!r}"
    if case.get("stop") == "e" and "e" in found[0][0]:
        return "the text contains the stop string"
    if case.get("response_format", {}).get("type") == "json_schema":
        value = json.loads(found[0][0])
        if set(value) != {"done", "color"} or value["color"] not in ("red", "green"):
            return f"{value} does not match the schema"
    if case.get("tool_choice") not in (None, "auto", "none") and found[0][1] != "length":
        for name, arguments in found[0][2] or [("", "{}")]:
            if name not in ("paint", "clean") or set(json.loads(arguments)) != {"done", "color"}:
                return f"the call {name}({arguments})"
        forced = isinstance(case["tool_choice"], dict)  # there OpenAI's reason is "stop"
        if found[0][1] != ("stop" if forced else "tool_calls"):
            return f"finish_reason {found[0][1]}"
    return ""


def errors(client: openai.OpenAI, model: str) -> dict[str, Callable[[], Any]]:
    """Calls that have to raise, by the name of the exception."""
    chat, complete = client.chat.completions.create, client.completions.create
    return {
        "BadRequestError: suffix": lambda: complete(model=model, prompt="a", suffix="b"),
        "BadRequestError: temperature": lambda: complete(model=model, prompt="a", temperature=9),
        "BadRequestError: too long": lambda: complete(model=model, prompt="a", max_tokens=10**6),
        "BadRequestError: no messages": lambda: chat(model=model, messages=[]),
        "NotFoundError: model": lambda: client.models.retrieve("no-such-model"),
    }


def streamed_events(client: openai.OpenAI, model: str) -> tuple[str, bool]:
    """The client's own accumulation of a stream, which validates every event."""
    form: Any = CHATS["json_schema"]["response_format"]
    messages: Any = USER
    with client.chat.completions.stream(
        model=model, messages=messages, response_format=form, max_tokens=64
    ) as stream:
        kinds = {event.type for event in stream}
        text = stream.get_final_completion().choices[0].message.content
    return f"events {', '.join(sorted(kinds))}", set(json.loads(text or "{}")) == {"done", "color"}


async def main(url: str, model: str) -> list[tuple[str, str, bool]]:
    """The rows."""
    rows: list[tuple[str, str, bool]] = []
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300)
    other = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=300)
    routes: list[tuple[str, Any, Any, dict[str, dict[str, Any]]]] = [
        ("completions", client.completions.create, other.completions.create, COMPLETIONS),
        ("chat", client.chat.completions.create, other.chat.completions.create, CHATS),
    ]
    for route, make, make_async, cases in routes:
        failed, same = [], 0
        for name, case in cases.items():
            case = {"model": model} | ({} if route == "completions" else {"messages": USER}) | case
            try:
                wrong = await three_ways(make, make_async, case)
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"
            same += not wrong
            failed += [f"{name}: {wrong}"] if wrong else []
        result = f"{same} of {len(cases)} parameters, sync = async = stream"
        rows.append((route, "; ".join([result, *failed]), not failed))
    raised, wrong_errors = 0, []
    for name, call in errors(client, model).items():
        try:
            call()
            wrong_errors.append(f"{name}: nothing raised")
        except openai.APIStatusError as error:
            good = type(error).__name__ == name.split(":")[0] and error.body
            raised += bool(good)
            wrong_errors += [] if good else [f"{name}: {error!r}"]
    result = f"{raised} of {len(errors(client, model))} errors have the right class and a body"
    rows.append(("errors", "; ".join([result, *wrong_errors]), not wrong_errors))
    names = [card.id for card in client.models.list().data]
    rows.append(("models", f"lists {names}", names == [model]))
    rows.append(("helper .stream()", *streamed_events(client, model)))
    return rows


if __name__ == "__main__":
    found = asyncio.run(main(sys.argv[1], sys.argv[2]))
    Path(sys.argv[3]).write_text(json.dumps(found))

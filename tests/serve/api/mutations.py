"""Malformed requests, as bytes: seeded mutations of valid ones, of every route.

Most mutations change the JSON body (values, types, names, nesting, bytes), the others what is
around it: method, path, headers, lengths, chunks.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Call:
    """A request before it is written as bytes."""

    method: str
    path: str
    body: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    version: bytes = b"HTTP/1.1"
    length: int | None = None
    """Content-Length, if it is not that of the body."""
    chunks: bytes | None = None
    """The body in a chunked encoding, right or wrong."""

    def encode(self) -> bytes:
        target = self.path.encode("utf-8", "surrogatepass")
        lines = [b"%s %s %s" % (self.method.encode(), target, self.version)]
        headers = [(b"Host", b"x"), (b"Connection", b"close"), *self.headers]
        if self.chunks is not None:
            headers.append((b"Transfer-Encoding", b"chunked"))
        elif self.body or self.length is not None:
            length = len(self.body) if self.length is None else self.length
            headers.append((b"Content-Length", b"%d" % length))
        lines += [b"%s: %s" % header for header in headers]
        head = b"\r\n".join(lines) + b"\r\n\r\n"
        return head + (self.body if self.chunks is None else self.chunks)


def valid_calls(folder: str) -> list[tuple[str, str, Any]]:
    """Method, path and body of a valid call of every route. folder: of the export."""
    completion = {
        "model": "tiny", "prompt": "a b", "max_tokens": 3, "n": 1, "temperature": 0.5,
        "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 1, "stop": ["zz"], "logprobs": 1,
        "echo": False, "stream": False, "stream_options": {"include_usage": True},
        "logit_bias": {"5": 1.0}, "presence_penalty": 0.5, "frequency_penalty": 0.5,
        "repetition_penalty": 1.1, "min_tokens": 1, "stop_token_ids": [7], "ignore_eos": True,
        "skip_special_tokens": True, "add_special_tokens": True, "return_token_ids": True,
        "priority": 1, "user": "me", "best_of": 1, "suffix": None,
    }  # fmt: skip
    chat = {
        "model": "tiny", "max_completion_tokens": 3, "logprobs": True, "top_logprobs": 2,
        "stream": True, "seed": 2, "stop": "zz", "temperature": 1,
        "tools": [], "tool_choice": "none",
        "response_format": {"type": "text"}, "chat_template_kwargs": {"tag": "x"},
        "messages": [
            {"role": "system", "content": "b"},
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            ]},
            {"role": "tool", "content": "c", "tool_call_id": "1", "name": "f"},
        ],
    }  # fmt: skip
    native = {
        "text": ["a", "b"], "rid": ["one", "two"], "stream": False, "return_logprob": True,
        "logprob_start_len": 0, "top_logprobs_num": 1, "return_text_in_logprobs": True,
        "return_routed_experts": False, "priority": 0,
        "sampling_params": [
            {"max_new_tokens": 2, "temperature": 0, "n": 2}, {"max_new_tokens": 2, "stop": ["q"]},
        ],
    }  # fmt: skip
    ids = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 3}, "stream": True}
    get = ["/health", "/health_generate", "/metrics", "/v1/models", "/v1/models/tiny"]
    get += ["/model_info", "/get_model_info", "/server_info", "/get_server_info", "/get_load"]
    get += ["/v1/loads", "/flush_cache"]
    return [
        *(("GET", path, None) for path in get),
        *[("POST", "/v1/completions", completion)] * 8,
        ("POST", "/v1/completions", completion | {"prompt": [[5, 6], [7]], "stream": True}),
        *[("POST", "/v1/chat/completions", chat)] * 8,
        *[("POST", "/generate", native)] * 5,
        *[("POST", "/generate", ids)] * 2,
        *[("POST", "/tokenize", {"prompt": ["a", "b"], "add_special_tokens": True})] * 2,
        *[("POST", "/detokenize", {"tokens": [[5, 6], [7]], "skip_special_tokens": True})] * 2,
        ("POST", "/abort_request", {"rid": "nothing", "abort_all": False}),
        ("POST", "/update_weights_from_disk", {
            "model_path": folder, "load_format": "auto", "abort_all_requests": False,
        }),
    ]  # fmt: skip


def mutation(seed: int, folder: str) -> bytes:
    """The bytes of one request."""
    rng = random.Random(seed)
    method, path, fields = rng.choice(valid_calls(folder))
    around: list[Callable[[random.Random, Call], Call]] = list(_AROUND)
    body = b""
    if fields is not None and rng.random() < 0.9:
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            fields = _mutate_value(rng, fields)
        body = _dump(fields)
        if rng.random() < 0.25:
            body = _mutate_bytes(rng, body)
    elif fields is not None:
        body = _dump(fields)
    # these would end the call of the good client
    for name in (b"abort_all", b"abort_all_requests"):
        body = body.replace(b'"%s": true' % name, b'"%s": null' % name)
    call = Call(method, path, body)
    if not body or rng.random() < 0.3:
        call = rng.choice(around)(rng, call)
    data = call.encode()
    if rng.random() < 0.05:
        data = data[: rng.randrange(len(data))]
    elif rng.random() < 0.05:
        data = _mutate_bytes(rng, data)
    return data


def _dump(value: Any) -> bytes:
    return _RAW.dump(value)


class _Raw:
    """JSON with numbers and constants that Python's values cannot express."""

    def __init__(self) -> None:
        self.texts = (
            "NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1" + "0" * 400, "-" + "9" * 5000,
            "-0.0", "5e-324", "1.0000000000000000000001", "01", "0x10", "1e", "tru", "'a'",
            "[" * 970 + "]" * 970, "[" * 990 + "]" * 990, "[" * 1010 + "]" * 1010,
            '{"a":' * 980 + "1" + "}" * 980, "[" * 10_000 + "]" * 10_000, "{" * 500,
            '"' + "\\ud800" + '"', '"\\u0000"', '"\\x"', '"' + "a" * 100_000 + '"',
            '"' + "\\ud83d" + '"', "[" + "1," * 20_000 + "1]", "[" + "[]," * 20_000 + "[]]",
        )  # fmt: skip

    def mark(self, index: int) -> str:
        return f"@raw {index}@"

    def dump(self, value: Any) -> bytes:
        text = json.dumps(value)
        for index, raw in enumerate(self.texts):
            text = text.replace(f'"{self.mark(index)}"', raw)
        return text.encode()


_RAW = _Raw()
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 1.0, 0.5, -0.5, 2**31, 2**63, 2**64, -(2**63), 10**30, 1e308,
    "", "a", "1", "\n", "\x1b[2J", "<|endoftext|>", "日本語🙂", "\ud800", "../../etc/passwd",
    "http://127.0.0.1:1/x", "{{ 7*7 }}", "a" * 300, [], {}, [None], [[]], [[], 5], [{}], {"": ""},
    {"a": {"b": {"c": []}}}, [True], ["a", 1], [-1], [10**12], [5] * 300, ["a"] * 200,
    {"\ud800": 1}, {"type": "json_object"}, {"5": "x"}, {"99999999999999": 1},
)  # fmt: skip
_NAMES = (
    "prompt", "messages", "text", "input_ids", "n", "max_tokens", "stop", "seed", "rid", "tools",
    "guided_json", "regex", "ebnf", "response_format", "\ud800", "", "a" * 3000, "__class__",
    "prompt_embeds", "image_data", "lora_path", "logits_processors", "max_new_tokens", "sampling",
    "chat_template", "documents", "bootstrap_room", "data_parallel_rank", "stream", "echo",
)  # fmt: skip


def _value(rng: random.Random) -> Any:
    if rng.random() < 0.4:
        return _RAW.mark(rng.randrange(len(_RAW.texts)))
    return rng.choice(_VALUES)


def _mutate_value(rng: random.Random, value: Any) -> Any:
    """A copy with one place changed."""
    if isinstance(value, dict) and value and rng.random() < 0.97:
        name = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.5 or (kind < 0.8 and isinstance(value[name], dict | list)):
            return value | {name: _mutate_value(rng, value[name])}
        if kind < 0.8:
            return value | {name: _value(rng)}
        if kind < 0.9:
            return {key: one for key, one in value.items() if key != name}
        return value | {rng.choice(_NAMES): _value(rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        kind = rng.random()
        if kind < 0.6:
            return [*value[:at], _mutate_value(rng, value[at]), *value[at + 1 :]]
        if kind < 0.8:
            return [*value[:at], *value[at + 1 :]]
        return value * rng.choice([2, 50])
    return _value(rng)


def _mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    kind = rng.randrange(4)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + rng.randbytes(rng.choice([1, 4, 64])) + data[at:]
    if kind == 2:
        return data[:at] + rng.randbytes(1) + data[at + 1 :]
    return data[:at] + data[at // 2 :]


def _chunked(rng: random.Random, call: Call) -> Call:
    """A chunked body; half of them violate the encoding."""
    at = rng.randrange(len(call.body) + 1)
    parts = [part for part in (call.body[:at], call.body[at:]) if part]
    right = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    wrong = [
        right.replace(b"\r\n", b"\n"), right[: len(right) // 2], b"-1\r\n" + right,
        b"%x\r\n%s" % (2**80, call.body), b"zz\r\n" + right, right[:-5] + b"5\r\n\r\n",
        b"5;" + b"e" * 20_000 + b"\r\nhello\r\n0\r\n\r\n", right[:-2] + b"T: x\r\n\r\n",
        right[:-2] + b"bad trailer\r\n\r\n",
    ]  # fmt: skip
    return replace(call, chunks=right if rng.random() < 0.5 else rng.choice(wrong))


def _length(rng: random.Random, call: Call) -> Call:
    n = len(call.body)
    return replace(
        call, length=rng.choice([0, n // 2, n + 1, n + 100, 4 << 20, 5 << 20, 2**62, -1])
    )


def _method(rng: random.Random, call: Call) -> Call:
    methods = ["GET", "POST", "PUT", "HEAD", "OPTIONS", "DELETE", "PATCH", "TRACE", "CONNECT", "X"]
    methods += ["get", "P\x00ST", "A" * 300, "PO ST"]
    return replace(call, method=rng.choice(methods))


def _path(rng: random.Random, call: Call) -> Call:
    paths = ["", "/", "//", "*", "/v1", call.path + "/", call.path + "?x=" + "%ff" * 9]
    paths += [
        call.path.upper(),
        "/%2e%2e/" + call.path,
        "/v1/models/%ed%a0%80",
        "/v1/models/\ud800",
    ]
    paths += [
        "/" + "a" * 20_000,
        "http://evil/" + call.path,
        "/v1/models/%00",
        "/é",
        call.path + "#a",
    ]
    return replace(call, path=rng.choice(paths))


def _headers(rng: random.Random, call: Call) -> Call:
    headers = [
        (b"Content-Type", b"text/plain"), (b"Content-Type", b"multipart/form-data; boundary=x"),
        (b"Content-Type", b"application/x-www-form-urlencoded"), (b"Content-Type", b"\xff"),
        (b"Content-Encoding", b"gzip"), (b"Expect", b"100-continue"), (b"Expect", b"x"),
        (b"Upgrade", b"websocket"), (b"Upgrade", b"h2c"), (b"Connection", b"keep-alive, upgrade"),
        (b"Transfer-Encoding", b"gzip, chunked"), (b"Transfer-Encoding", b"chunked"),
        (b"Content-Length", b"7"), (b"Content-Length", b"1" * 5000), (b"Host", b"y"),
        (b"Authorization", b"Bearer " + b"x" * 9000), (b"X" * 17_000, b"1"), (b"X", b"1" * 17_000),
        (b"", b"x"), (b"Bad Name", b"x"), (b"X", b"a\x00b"), (b"X", b"\r\nY: 1"),
        (b"Range", b"bytes=0-"),
        (b"Accept", b"nothing/at-all"), (b"Accept-Encoding", b"br"), (b"Cookie", b"=" * 4000),
    ]  # fmt: skip
    return replace(call, headers=tuple(rng.sample(headers, rng.choice([1, 1, 2, 4]))))


def _version(rng: random.Random, call: Call) -> Call:
    return replace(
        call, version=rng.choice([b"HTTP/1.0", b"HTTP/2", b"HTTP/9.9", b"", b"http/1.1"])
    )


_AROUND = (_chunked, _chunked, _length, _method, _path, _headers, _headers, _version)

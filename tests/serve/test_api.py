"""The server with different clients: the official one, plain HTTP, and clients that violate the
protocol."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from tokenizers import Tokenizer

from tests.serve.conftest import GreedyReference, RunningServer
from tests.serve.drive import slow_down

if TYPE_CHECKING:
    import openai  # takes a second, which only the tests with a client need

GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as made:
        yield made


def test_health_and_models(http: httpx.Client, client: "openai.OpenAI") -> None:
    assert http.get("/health").json() == {"status": "ok"}
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_openai_client_completes_greedily(
    client: "openai.OpenAI", tokenizer: Tokenizer, greedy_reference: GreedyReference
) -> None:
    prompt = "def add(a, b):"
    tokens = greedy_reference(tokenizer.encode(prompt).ids, 32)
    found = client.completions.create(model="tiny", prompt=prompt, max_tokens=32, **GREEDY)
    assert found.choices[0].text == tokenizer.decode(tokens)
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None
    counts = (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens)
    n = len(tokenizer.encode(prompt).ids)
    assert counts == (n, 32, n + 32)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"n": 3, "temperature": 1.0, "seed": 5},
        {"stop": ["e", "zz"], "temperature": 0.8, "seed": 2},
        {"logprobs": 2, "echo": True},
        {"prompt": ["The quick", "for number in"], "n": 2, "temperature": 1.0, "seed": 1},
        {"prompt": [[5, 6, 7], [8, 9]], "logprobs": 0, "temperature": 0.0},
    ],
)
def test_streaming_equals_not_streaming(client: "openai.OpenAI", extra: dict[str, Any]) -> None:
    call = {"model": "tiny", "prompt": "日本語 🙂", "max_tokens": 16, "temperature": 0.0, **extra}
    whole = client.completions.create(**call)
    pieces = list(
        client.completions.create(**call, stream=True, stream_options={"include_usage": True})
    )
    assert pieces[-1].choices == []
    assert pieces[-1].usage is not None and whole.usage is not None
    counts = [
        vars(one) | {"prompt_tokens_details": None} for one in (pieces[-1].usage, whole.usage)
    ]
    assert counts[0] == counts[1], "all but what was cached meanwhile"
    for choice in whole.choices:
        mine = [c for p in pieces for c in p.choices if c.index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        assert [c.finish_reason for c in mine if c.finish_reason] == [choice.finish_reason]
        if choice.logprobs is not None:
            values = [v for c in mine if c.logprobs for v in c.logprobs.token_logprobs or []]
            assert choice.logprobs.token_logprobs is not None
            assert values[1:] == pytest.approx(choice.logprobs.token_logprobs[1:], abs=1e-4)


def test_choices_of_a_seed_differ_and_repeat(client: "openai.OpenAI") -> None:
    call: dict[str, Any] = {"model": "tiny", "prompt": "A", "max_tokens": 20, "n": 4, "seed": 3}
    first, second = (client.completions.create(**call) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert len(set(texts)) == 4
    assert texts == [choice.text for choice in second.choices]


def test_sampling_fields_reach_the_sampler(http: httpx.Client) -> None:
    def ids(**fields: Any) -> list[int]:
        body = {"prompt": "The", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        answer = http.post("/v1/completions", json=body | {"return_token_ids": True} | fields)
        found: list[int] = answer.json()["choices"][0]["token_ids"]
        return found

    plain = ids()
    assert ids(logit_bias={"77": 100}) == [77] * 12
    assert len(set(ids(logit_bias={"77": 5}, frequency_penalty=2.0))) > 2
    assert ids(stop_token_ids=[plain[3]]) == plain[: plain.index(plain[3]) + 1]
    later = ids(stop_token_ids=[plain[0]], min_tokens=5)
    assert len(later) >= 5 and plain[0] not in later[:5]
    assert ids(temperature=1, min_p=1) == plain


def test_usage_says_what_was_cached(http: httpx.Client) -> None:
    body = {"prompt": list(range(1, 41)), "max_tokens": 1, "n": 2}
    cached = [
        http.post("/v1/completions", json=body).json()["usage"]["prompt_tokens_details"]
        for _ in range(2)
    ]
    assert cached == [{"cached_tokens": 0}, {"cached_tokens": 32}]


def test_echo_and_logprobs_score_a_prompt(http: httpx.Client) -> None:
    """Requests of evaluation harnesses: token ids, echo, one token."""
    prompt = [5, 17, 99, 200]
    body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    found = choice["logprobs"]
    assert [len(values) for values in found.values()] == [5] * 4
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    assert all(value < 0 for value in found["token_logprobs"][1:])
    best = max(found["top_logprobs"][-1].values())
    assert found["token_logprobs"][-1] == best, "the greedy token is the best one"
    assert choice["text"].startswith(found["tokens"][0])


def test_many_clients_at_once(
    server: RunningServer, http: httpx.Client, greedy_reference: GreedyReference
) -> None:
    prompts = [[1 + i, 2 + i, 3 + i] * (1 + i % 7) for i in range(24)]
    greedy_reference.compute(prompts, 10)
    found: dict[int, list[int]] = {}

    def ask(i: int) -> None:
        body = {"prompt": prompts[i], "max_tokens": 10, "temperature": 0, "ignore_eos": True}
        answer = http.post("/v1/completions", json={**body, "return_token_ids": True})
        found[i] = answer.json()["choices"][0]["token_ids"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: greedy_reference(prompt, 10) for i, prompt in enumerate(prompts)}
    server.wait_until_idle()


BAD: list[tuple[Any, int, str]] = [
    (b"", 400, "invalid_json"),
    (b"{", 400, "invalid_json"),
    (b"\xff\xfe", 400, "invalid_json"),
    (b'{"prompt": "a", "temperature": NaN}', 400, "invalid_json"),
    (b"[" * 100_000, 400, "invalid_json"),
    (b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
    (b'{"prompt": "a", "n": ' + b"9" * 4000 + b"}", 400, "invalid_value"),
    ([], 400, "invalid_type"),
    ({}, 400, "invalid_type"),
    ({"prompt": None}, 400, "invalid_type"),
    ({"prompt": []}, 400, "invalid_type"),
    ({"prompt": [[]]}, 400, "invalid_type"),
    ({"prompt": [1, "a"]}, 400, "invalid_type"),
    ({"prompt": [True]}, 400, "invalid_type"),
    ({"prompt": [1.5]}, 400, "invalid_type"),
    ({"prompt": {"a": 1}}, 400, "invalid_type"),
    ({"prompt": [320]}, 400, "invalid_value"),
    ({"prompt": [-1]}, 400, "invalid_value"),
    ({"prompt": [10**30]}, 400, "invalid_value"),
    ({"prompt": ["a"] * 129}, 400, "invalid_value"),
    (b'{"prompt": "\\ud800"}', 400, "invalid_value"),
    ({"prompt": [5] * 177}, 400, "context_length_exceeded"),
    ({"prompt": "a", "max_tokens": 192}, 400, "context_length_exceeded"),
    ({"prompt": "a", "max_tokens": 10**9}, 400, "invalid_value"),
    ({"prompt": "a", "max_tokens": -1}, 400, "invalid_value"),
    ({"prompt": "a", "max_tokens": "5"}, 400, "invalid_type"),
    ({"prompt": "a", "max_tokens": True}, 400, "invalid_type"),
    ({"prompt": "a", "temperature": -0.1}, 400, "invalid_value"),
    ({"prompt": "a", "temperature": 2.1}, 400, "invalid_value"),
    ({"prompt": "a", "temperature": "hot"}, 400, "invalid_type"),
    (b'{"prompt": "a", "temperature": 1e999}', 400, "invalid_value"),
    ({"prompt": "a", "top_p": 0}, 400, "invalid_value"),
    ({"prompt": "a", "top_p": 1.01}, 400, "invalid_value"),
    ({"prompt": "a", "top_k": -2}, 400, "invalid_value"),
    ({"prompt": "a", "top_k": 1.0}, 400, "invalid_type"),
    ({"prompt": "a", "seed": 2**64}, 400, "invalid_value"),
    ({"prompt": "a", "seed": "x"}, 400, "invalid_type"),
    ({"prompt": "a", "n": 0}, 400, "invalid_value"),
    ({"prompt": "a", "n": 129}, 400, "invalid_value"),
    ({"prompt": ["a", "b"], "n": 65}, 400, "invalid_value"),
    ({"prompt": "a", "n": 1.0}, 400, "invalid_type"),
    ({"prompt": "a", "logprobs": 21}, 400, "invalid_value"),
    ({"prompt": "a", "n": 0}, 400, "invalid_value"),
    ({"prompt": "a", "min_p": 1.5}, 400, "invalid_value"),
    ({"prompt": "a", "presence_penalty": 2.5}, 400, "invalid_value"),
    ({"prompt": "a", "repetition_penalty": 0}, 400, "invalid_value"),
    ({"prompt": "a", "min_tokens": 17}, 400, "invalid_value"),
    ({"prompt": "a", "stop_token_ids": 5}, 400, "invalid_type"),
    ({"prompt": "a", "stop_token_ids": [300]}, 400, "invalid_value"),
    ({"prompt": "a", "logit_bias": {"5": "x"}}, 400, "invalid_type"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, 400, "invalid_type"),
    ({"prompt": "a", "logit_bias": {"300": 1}}, 400, "invalid_value"),
    ({"prompt": "a", "logprobs": True}, 400, "invalid_type"),
    ({"prompt": "a", "stop": 5}, 400, "invalid_type"),
    ({"prompt": "a", "stop": [5]}, 400, "invalid_type"),
    ({"prompt": "a", "stop": ""}, 400, "invalid_value"),
    ({"prompt": "a", "stop": ["a"] * 65}, 400, "invalid_value"),
    ({"prompt": "a", "stop": ["a" * 257]}, 400, "invalid_value"),
    ({"prompt": "a", "stream": "yes"}, 400, "invalid_type"),
    ({"prompt": "a", "stream_options": []}, 400, "invalid_type"),
    ({"prompt": "a", "echo": 1}, 400, "invalid_type"),
    ({"prompt": "a", "ignore_eos": 1}, 400, "invalid_type"),
    ({"prompt": "a", "suffix": "b"}, 400, "unsupported_parameter"),
    ({"prompt": "a", "best_of": 2}, 400, "unsupported_parameter"),
    ({"prompt": "a", "response_format": {"type": "xml"}}, 400, "invalid_value"),
    ({"prompt": "a", "model": "gpt"}, 404, "model_not_found"),
    ({"prompt": "a", "model": 5}, 404, "model_not_found"),
    (b'{"prompt": "' + b"a" * (4 << 20) + b'"}', 413, "request_too_large"),
]


@pytest.mark.parametrize(("body", "status", "code"), BAD, ids=range(len(BAD)))
def test_bad_bodies(http: httpx.Client, body: Any, status: int, code: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = http.post("/v1/completions", content=content)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == code
    assert error["type"] == "invalid_request_error"
    for secret in ("Traceback", "0x", "/", ".py"):
        assert secret not in error["message"]


def test_chunked_body_is_limited_too(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", content=iter([b"a" * 2**20] * 6))
    assert answer.status_code == 413


@pytest.mark.parametrize("where", ["header", "query"])
def test_large_headers(http: httpx.Client, where: str) -> None:
    big = "a" * 17_000
    call = {"headers": {"x-big": big}} if where == "header" else {"params": {"big": big}}
    answer = http.get("/health", **call)  # type: ignore[arg-type]
    assert answer.status_code == 431
    assert answer.json()["error"]["code"] == "headers_too_large"


def test_neutral_and_unknown_fields_are_accepted(http: httpx.Client) -> None:
    body: dict[str, Any] = {
        "prompt": "a",
        "max_tokens": None,
        "stop": None,
        "best_of": 1,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "bootstrap_room": 7,
        "user": "me",
        "seed": -1,
        "top_k": -1,
        "stream_options": None,
    }
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] <= 16


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("GET", "/v1/models/x", 404),
        ("POST", "/v1/completions/", 404),
        ("GET", "/health/", 404),
    ],
)
def test_wrong_places(http: httpx.Client, method: str, path: str, status: int) -> None:
    """No redirect either: its address would be that of the Host header, and not https."""
    answer = http.request(method, path, headers={"Host": "[::"})
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"


LONG = {"prompt": "a", "max_tokens": 180, "ignore_eos": True}


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_frees_pages(small_server: RunningServer, stream: bool) -> None:
    slow_down(small_server.core, 0.05)  # 180 tokens would take nine seconds
    body = json.dumps({**LONG, "stream": stream, "n": 2}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    port = int(small_server.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(head.encode() + body)
        while not small_server.core.scheduler.running:
            time.sleep(0.01)
        requests = list(small_server.core.scheduler.running)
    small_server.wait_until_idle()
    assert {request.finish_reason for request in requests} == {"cancelled"}


def test_overload_is_refused_and_passes(small_server: RunningServer) -> None:
    slow_down(small_server.core, 0.02)
    url = f"{small_server.url}/v1/completions"
    with httpx.Client(timeout=30) as client:
        four = threading.Thread(
            target=client.post, args=(url,), kwargs={"json": {**LONG, "max_tokens": 15, "n": 4}}
        )
        four.start()
        while len(small_server.core.scheduler.running) < 2:
            time.sleep(0.01)
        refused = client.post(url, json={"prompt": "a"})
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        four.join()
        assert client.post(url, json={"prompt": "a"}).status_code == 200
    small_server.wait_until_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_fault_in_the_engine_is_one_clean_error(small_server: RunningServer, stream: bool) -> None:
    run = small_server.core.executor.runner.run

    def broken(*step: Any) -> Any:
        raise RuntimeError("secret /path")

    small_server.core.executor.runner.run = broken  # type: ignore[method-assign, assignment]
    url = f"{small_server.url}/v1/completions"
    answer = httpx.post(url, json={"prompt": "a", "stream": stream})
    assert "secret" not in answer.text
    if stream:
        error, done = answer.text.strip().split("\n\n")
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "internal_error"
        assert done == "data: [DONE]"
    else:
        assert answer.status_code == 500
    small_server.core.executor.runner.run = run  # type: ignore[method-assign]
    assert httpx.post(url, json={"prompt": "a"}, timeout=30).status_code == 200
    assert httpx.get(f"{small_server.url}/health").status_code == 200
    small_server.wait_until_idle()


def test_dead_engine_shows_in_health(small_server: RunningServer) -> None:
    small_server.thread.stop()
    assert httpx.get(f"{small_server.url}/health").status_code == 503
    answer = httpx.post(f"{small_server.url}/v1/completions", json={"prompt": "a"})
    assert answer.status_code == 503

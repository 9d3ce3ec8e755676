"""What waits or fails in one place does not stop the rest of the server."""

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from serve.api import service
from serve.api.openai_completions import CompletionsWriter
from serve.frontend.client import EngineStats
from serve.grammar.matcher import Grammar
from tests.serve.conftest import RunningServer

LIVENESS_S = 60.0
N_CALLS = 40
"""More than the default number of worker threads of any machine."""


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    limits = httpx.Limits(max_connections=None)
    with httpx.Client(base_url=server.url, timeout=LIVENESS_S, limits=limits) as made:
        yield made


def until(done: threading.Event, result: Any) -> Callable[..., Any]:
    def wait(*_: object) -> Any:
        assert done.wait(LIVENESS_S)
        return result

    return wait


@pytest.mark.parametrize(
    ("name", "method", "path", "result"),
    [
        ("update_weights", "POST", "/update_weights_from_disk", None),
        ("flush_cache", "GET", "/flush_cache", None),
        ("stats", "GET", "/v1/loads", EngineStats()),
        ("stats", "GET", "/metrics", EngineStats()),
    ],
)
def test_calls_that_wait_for_the_engine_leave_threads_for_prompts(
    server: RunningServer, http: httpx.Client, monkeypatch: pytest.MonkeyPatch,
    name: str, method: str, path: str, result: Any,
) -> None:  # fmt: skip
    done = threading.Event()
    monkeypatch.setattr(server.thread, name, until(done, result))
    with ThreadPoolExecutor(N_CALLS) as pool:
        body = {"model_path": "/some/folder"} if method == "POST" else None
        calls = [pool.submit(http.request, method, path, json=body) for _ in range(N_CALLS)]
        try:
            time.sleep(0.2)
            assert http.post("/tokenize", json={"prompt": "a b"}).status_code == 200
            good = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
            assert good.status_code == 200
            assert http.get("/health").status_code == 200
            assert not any(call.done() for call in calls)
        finally:
            done.set()
        assert {call.result().status_code for call in calls} == {200}


@pytest.mark.parametrize("value", ["a fault", float("nan")])
def test_a_fault_in_a_stream_is_an_event(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch, value: Any
) -> None:
    """Also what JSON cannot express, which clients cannot read."""
    add, outputs = CompletionsWriter.add, itertools.count()

    def faulty(self: CompletionsWriter, output: Any) -> Any:
        if next(outputs) < 3:
            return add(self, output)
        if value == "a fault":
            raise KeyError("a fault of the server")
        return [{"choices": [{"index": 0, "text": "", "logprobs": value}]}]

    monkeypatch.setattr(CompletionsWriter, "add", faulty)
    body = {"prompt": "a", "max_tokens": 50, "stream": True, "ignore_eos": True}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        *_, error, end = [line for line in answer.iter_lines() if line]
    assert end == "data: [DONE]"
    found = json.loads(error.removeprefix("data: "))["error"]
    assert (found["code"], found["type"]) == ("internal_error", "server_error")
    assert "fault" not in found["message"]


def test_nobody_waits_for_a_grammar_forever(
    server: RunningServer, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compilation goes on, and the next request finds its result."""
    assert server.core.grammars is not None
    compiling: Future[Grammar] = Future()
    monkeypatch.setattr(service, "ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(server.core.grammars, "compile", lambda spec: compiling)
    body = {"prompt": "a", "max_tokens": 1, "guided_regex": "a"}
    refused = http.post("/v1/completions", json=body)
    assert refused.status_code == 503 and refused.headers["retry-after"] == "5"
    assert refused.json()["error"]["code"] == "grammar_not_ready"
    assert not compiling.cancelled()
    server.wait_until_idle()
    assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200

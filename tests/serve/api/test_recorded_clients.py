"""Bodies as routers and benchmarks of other projects send them (`scripts/check_clients`)."""

import json
import threading
from typing import Any

import httpx
import pytest

from serve.engine.request import Output
from tests.serve.conftest import RunningServer

HELLO = [{"role": "user", "content": "Hello"}]
ROUTER: dict[str, Any] = {
    "stream": False, "no_stop_trim": False, "ignore_eos": False, "skip_special_tokens": True,
    "return_hidden_states": False,
}  # fmt: skip
RECORDED: dict[str, tuple[str, dict[str, Any]]] = {
    "sglang-router 0.3.2, completions": ("/v1/completions", ROUTER | {
        "model": "tiny", "prompt": "def f(x):", "max_tokens": 4, "temperature": 0.0, "logprobs": 1,
        "echo": False,
    }),
    "sglang-router 0.3.2, chat": ("/v1/chat/completions", ROUTER | {
        "messages": HELLO, "model": "tiny", "logprobs": False, "max_completion_tokens": 4,
        "response_format": {"type": "text"}, "stop": ["x"],
        "continue_final_message": False, "separate_reasoning": True, "stream_reasoning": True,
    }),
    "sglang-router 0.3.2, generate": ("/generate", {
        "text": "a", "model": None, "sampling_params": {"max_new_tokens": 2},
        "return_text_in_logprobs": False, "stream": False, "log_metrics": True,
        "return_hidden_states": False, "background": False, "no_logs": False,
        "return_bytes": False, "return_entropy": False,
    }),
    "smg 1.13.0, generate": ("/generate", {
        "text": "a", "model": "unknown", "sampling_params": {"max_new_tokens": 2},
        "return_text_in_logprobs": False, "stream": False, "log_metrics": True,
        "background": False, "no_logs": False, "return_bytes": False, "return_entropy": False,
    }),
    "lm-eval 0.4.13, local-completions": ("/v1/completions", {
        "model": "tiny", "prompt": [[0, 40, 41, 42]], "temperature": 0, "max_tokens": 1,
        "logprobs": 1, "seed": 1234, "echo": True,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_bodies_are_answered(name: str, server: RunningServer) -> None:
    path, body = RECORDED[name]
    if "model" in body and path != "/generate":
        cards = httpx.get(f"{server.url}/v1/models", timeout=60).json()
        body = body | {"model": cards["data"][0]["id"]}
    answer = httpx.post(f"{server.url}{path}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["text"] is not None if path == "/generate" else len(found["choices"]) == 1


@pytest.mark.parametrize(
    "path", ["/v1/loads?include=core", "/get_load", "/server_info", "/model_info", "/metrics"]
)
def test_probes_of_routers(path: str, server: RunningServer) -> None:
    assert httpx.get(f"{server.url}{path}", timeout=60).status_code == 200


def test_no_event_comes_before_the_first_token(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients take the first event, with the role, for the first token."""
    computed, step = threading.Event(), server.core.step

    def late() -> list[Output]:
        if not computed.is_set():
            computed.wait(1.0)
            computed.set()
            before.append(list(events))
        return step()

    events: list[Any] = []
    before: list[list[Any]] = []
    monkeypatch.setattr(server.core, "step", late)
    body = {"messages": HELLO, "max_tokens": 3, "stream": True, "n": 2, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                events.append(json.loads(line[6:])["choices"][0])
    assert before == [[]]
    for index in (0, 1):
        deltas = [event["delta"] for event in events if event["index"] == index]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert not any("role" in delta for delta in deltas[1:])

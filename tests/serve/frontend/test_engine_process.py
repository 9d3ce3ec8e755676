"""The engine in a process of its own: the answers of a thread, and what happens when it ends."""

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from configs.errors import UserError
from serve.engine.core import EngineCore, EngineOptions
from serve.engine.loading import Export
from serve.engine.request import Output, RequestError, SamplingParams
from serve.frontend.engine_process import EngineProcess
from tests.serve.conftest import run_app, run_server, write_export
from tests.serve.forked_child import launch_engine

LIVENESS_S = 300.0
OPTIONS: dict[str, Any] = {"kv_tokens": 2048, "routed_experts": True, "max_running": 4}
CHAT = {"messages": [{"role": "user", "content": "Why?"}]}
LONG = {"prompt": [5] * 9, "max_tokens": 180, "ignore_eos": True, "temperature": 0}
SHORT = LONG | {"max_tokens": 12}


def make_engine(folder: Path, **options: Any) -> EngineProcess:
    given = EngineOptions(**{**OPTIONS, **options})
    return EngineProcess(folder, "auto", "cpu", given, launch_engine)


@pytest.fixture(scope="module")
def server(export_folder: Path) -> Iterator[tuple[EngineProcess, httpx.Client]]:
    engine = make_engine(export_folder, max_waiting=2)
    with run_app(engine) as port:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=LIVENESS_S) as http:
            yield engine, http
    assert engine.status == "stopped" and engine._process.end() == 0


def wait_until(found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIVENESS_S
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.01)


CALLS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": ["ab", "日本"], "seed": 3, "n": 2, "logprobs": 2, "echo": True}),
    ("/v1/completions", {"prompt": [7, 8, 9], "max_tokens": 0, "echo": True, "logprobs": 0}),
    ("/v1/completions", {**SHORT, "stream": True, "stream_options": {"include_usage": True}}),
    ("/v1/completions", {"prompt": "x", "max_tokens": 30, "seed": 1, "stop": ["a", "e", "\n"]}),
    ("/v1/completions", {"prompt": "x", "seed": 2**64 - 1, "logit_bias": {"7": 90.0, "8": -90}}),
    ("/v1/chat/completions", {**CHAT, "seed": -5, "logprobs": True, "top_logprobs": 3}),
    ("/v1/chat/completions", {**CHAT, "seed": 5, "max_tokens": 9, "stream": True, "n": 2}),
    ("/generate", {"text": "abc", "return_routed_experts": True, "return_logprob": True,
                   "logprob_start_len": 0, "top_logprobs_num": 1,
                   "sampling_params": {"max_new_tokens": 20, "sampling_seed": 9, "stop": ["th"]}}),
    ("/v1/completions", {"prompt": [1] * 500}),
    ("/update_weights_from_disk", {"model_path": "/no/such/folder"}),
]  # fmt: skip
"""Every kind of answer, with repeatable tokens."""


def without_names(text: str) -> Any:
    """An answer, its events by choice, without what differs between any two answers."""
    if not text.startswith("data: "):
        return _plain(json.loads(text))
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    events = [_plain(event) for event in events]
    return sorted(events, key=lambda e: ((c := e.get("choices")) and c[0]["index"]) or 0)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        dropped = ("id", "created", "e2e_latency")
        return {key: _plain(one) for key, one in value.items() if key not in dropped}
    return value


def test_every_answer_is_that_of_a_thread(
    server: tuple[EngineProcess, httpx.Client], export: Export
) -> None:
    _, http = server
    core = EngineCore(export, EngineOptions(**OPTIONS, max_waiting=2))
    with run_server(core) as other, httpx.Client(base_url=other.url, timeout=LIVENESS_S) as its:
        for path, body in CALLS:
            ours, expected = http.post(path, json=body), its.post(path, json=body)
            assert ours.status_code == expected.status_code
            assert without_names(ours.text) == without_names(expected.text), (path, body)
        assert http.get("/flush_cache").status_code == 200
        for path in ("/server_info", "/model_info", "/v1/models", "/stats", "/v1/loads"):
            ours, expected = (client.get(path).json() for client in (http, its))
            assert ours.keys() == expected.keys(), path
        totals = ("generated_tokens", "prompt_tokens", "experts", "running", "token_usage")
        ours, expected = (client.get("/stats").json() for client in (http, its))
        assert {t: ours[t] for t in totals} == {t: expected[t] for t in totals}


@pytest.mark.slow  # four processes load xgrammar
def test_grammars(server: tuple[EngineProcess, httpx.Client], export: Export) -> None:
    pytest.importorskip("xgrammar")
    _, http = server
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 5}}}
    core = EngineCore(export, EngineOptions(**OPTIONS))
    with run_server(core) as other, httpx.Client(base_url=other.url, timeout=LIVENESS_S) as its:
        for more in ({"guided_regex": "[0-9]{3}-[a-f]{4}"}, {"guided_json": schema, "n": 2}):
            for _ in range(2):
                body = {"prompt": "x", "max_tokens": 40, "seed": 4} | more
                ours, expected = (c.post("/v1/completions", json=body) for c in (http, its))
                assert ours.status_code == expected.status_code == 200
                assert (
                    without_names(ours.text)["choices"] == without_names(expected.text)["choices"]
                )
        refused = http.post("/v1/completions", json={"prompt": "x", "guided_regex": "["})
        assert refused.status_code == 400
        metrics = http.get("/metrics").text
    assert 'sglang:num_grammar_total{model_name="tiny"} 3.0' in metrics
    assert 'sglang:num_jump_forward_tokens_total{model_name="tiny"} 0.0' not in metrics


def test_a_client_that_leaves_frees_its_pages(server: tuple[EngineProcess, httpx.Client]) -> None:
    engine, http = server
    before = engine.stats().n_generated
    with http.stream("POST", "/v1/completions", json=LONG | {"n": 3, "stream": True}) as answer:
        next(answer.iter_lines())
    wait_until(lambda: engine.stats().n_running == engine.stats().n_used_pages == 0)
    assert engine.stats().n_generated - before < 3 * 180
    assert not (engine._sent or engine._number_of or engine._calls)


def test_a_full_queue(server: tuple[EngineProcess, httpx.Client]) -> None:
    engine, http = server
    with http.stream("POST", "/v1/completions", json=LONG | {"n": 6, "stream": True}) as answer:
        os.kill(engine.pid, signal.SIGSTOP)
        assert answer.status_code == 200
        refused = http.post("/v1/completions", json={"prompt": "a"})
        os.kill(engine.pid, signal.SIGCONT)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    wait_until(lambda: not engine._sent)
    never = http.post("/v1/completions", json={"prompt": "a", "n": 7})
    assert never.status_code == 400 and "fit into the queue" in never.text


def test_a_process_that_hangs_delays_nothing_else(
    server: tuple[EngineProcess, httpx.Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.frontend.engine_process._STATS_SECONDS", 0.1)
    engine, http = server
    os.kill(engine.pid, signal.SIGSTOP)
    try:
        answers: list[int] = []
        body = {"prompt": [5] * 100, "max_tokens": 2}
        callers = [
            threading.Thread(
                target=lambda: answers.append(http.post("/v1/completions", json=body).status_code)
            )
            for _ in range(3)
        ]
        for caller in callers:
            caller.start()
        wait_until(lambda: len(engine._sent) == 3)
        assert http.get("/health", timeout=5).status_code == 200
        assert http.get("/metrics", timeout=5).status_code == 200
        assert not answers
    finally:
        os.kill(engine.pid, signal.SIGCONT)
    for caller in callers:
        caller.join(LIVENESS_S)
    assert answers == [200] * 3


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGSEGV, marks=pytest.mark.slow)]
)
def test_a_killed_process_is_replaced(
    number: signal.Signals, export_folder: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Under load: streams end with an error event, others with 503, and after a while everything
    works again, with the last weights."""
    write_export(tmp_path / "new", seed=1)
    engine = make_engine(export_folder)
    expected = []
    with run_app(engine) as port, contextlib.ExitStack() as stack:
        http = stack.enter_context(
            httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=LIVENESS_S)
        )
        moved = http.post("/update_weights_from_disk", json={"model_path": str(tmp_path / "new")})
        assert moved.status_code == 200
        expected.append(http.post("/v1/completions", json=SHORT).json()["choices"])
        bodies = [LONG | {"stream": True, "prompt": [n, 5]} for n in range(3)]
        streams = [
            stack.enter_context(http.stream("POST", "/v1/completions", json=body))
            for body in bodies
        ]
        lines = [stream.iter_lines() for stream in streams]
        for one in lines:
            assert "choices" in next(one)
        whole: list[httpx.Response] = []
        body = LONG | {"n": 4}
        caller = threading.Thread(
            target=lambda: whole.append(http.post("/v1/completions", json=body))
        )
        caller.start()
        wait_until(lambda: len(engine._sent) == 7)
        os.kill(engine.pid, number)
        for one in lines:
            *_, error, done = [line for line in one if line]
            assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_lost"
            assert done == "data: [DONE]"
        caller.join(LIVENESS_S)
        assert whole[0].status_code == 503 and whole[0].headers["retry-after"]
        wait_until(lambda: http.get("/health").status_code == 200)
        assert http.post("/v1/completions", json=SHORT).json()["choices"] == expected[0]
        assert not http.get("/stats").json()["experts"]["counts"] == [[0] * 4]
        failed = 'sglang:num_failed_requests_total{model_name="tiny"}'
        assert f"{failed} " in http.get("/metrics").text
    assert f"ended (exit code -{int(number)}); it is started again" in caplog.text


def test_while_it_starts_again(export_folder: Path) -> None:
    """503 on /health and for requests; a second failure is tried again, and a stop ends it."""
    engine = make_engine(export_folder)
    begun, go_on = threading.Event(), threading.Event()

    def slow(theirs: Any) -> Any:
        begun.set()
        assert go_on.wait(LIVENESS_S)
        return launch_engine(theirs)

    with run_app(engine) as port:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=LIVENESS_S) as http:
            engine._launch = slow
            os.kill(engine.pid, signal.SIGKILL)
            assert begun.wait(LIVENESS_S)
            assert (health := http.get("/health")).status_code == 503
            assert health.json() == {"status": "the engine is starting"}
            for path, body in CALLS[:8]:
                refused = http.post(path, json=body)
                assert refused.status_code == 503 and refused.headers["retry-after"] == "5"
            assert http.get("/flush_cache").status_code == 503
            assert http.get("/stats").json()["status"] == "starting"
            assert http.get("/metrics").status_code == 200
            go_on.set()
            wait_until(lambda: http.get("/health").status_code == 200)
            begun.clear()
            go_on.clear()
            os.kill(engine.pid, signal.SIGKILL)
            assert begun.wait(LIVENESS_S)
            engine.stop(wait=False)
            go_on.set()
    assert engine.status == "stopped"


def test_a_stop_ends_requests_and_the_process(export_folder: Path) -> None:
    engine = make_engine(export_folder, max_waiting=8)
    engine.start()
    outputs: list[Output] = []
    params = SamplingParams(max_tokens=180, ignore_eos=True, n=8)
    requests = engine.inputs.make_requests([5, 6], params)
    engine.submit(requests, outputs.append)
    wait_until(lambda: len(outputs) > 2)
    for number in (signal.SIGTERM, signal.SIGINT):  # for the whole server: this process drains
        os.kill(engine.pid, number)
    n = len(outputs)
    wait_until(lambda: len(outputs) > n + 8)
    assert engine.status == "ok"
    engine.stop()
    ends = [output.finish_reason for output in outputs if output.finish_reason is not None]
    assert len(ends) == 8 and set(ends) == {"cancelled"}
    assert engine._process.end() == 0, "it has ended by itself"
    with pytest.raises(RequestError, match="shutting down"):
        engine.submit(requests[:1], outputs.append)
    assert engine.stats().n_pages, "the last known"


def test_what_the_user_can_change_takes_one_line(export_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(export_folder, folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        make_engine(folder)
    with pytest.raises(UserError, match="--kv-tokens 9999999999: needs"):
        make_engine(export_folder, kv_tokens=9999999999)

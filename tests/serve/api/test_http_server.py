"""Clients that violate HTTP, are slow, or stop reading; the key; draining; metrics."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.api import http_server, limits
from serve.engine.core import EngineCore, EngineOptions
from serve.engine.loading import Export
from tests.serve.conftest import RunningServer, run_server

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture
def connect(server: RunningServer) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        yield client


def read_all(client: socket.socket) -> bytes:
    data = b""
    while part := client.recv(65536):
        data += part
    return data


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"hello\r\n\r\n", 400),
        (b"GET / HTTP/9\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", None),  # TLS
        (b"GET /health HTTP/1.1\r\nHost: x\r\nBad Header: 1\r\n\r\n", 400),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400),
        (HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: gzip\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 40_000, 431),
    ],
)
def test_malformed_http_gets_a_json_error(
    connect: socket.socket, data: bytes, status: int | None
) -> None:
    connect.sendall(data)
    connect.shutdown(socket.SHUT_WR)
    head, _, body = read_all(connect).partition(b"\r\n\r\n")
    if status is not None:
        assert head.startswith(b"HTTP/1.1 %d" % status)
        assert b"application/json" in head
        assert json.loads(body)["error"]["message"]


def test_broken_chunks_get_an_error(connect: socket.socket) -> None:
    connect.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
    head, _, body = read_all(connect).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and json.loads(body)["error"]


def test_pipelined_requests_are_answered_in_order(connect: socket.socket) -> None:
    body = b'{"prompt": "a", "max_tokens": 1}'
    post = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    last = b"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    connect.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" + post + last)
    found = read_all(connect)
    assert [part[:3] for part in found.split(b"HTTP/1.1 ")[1:]] == [b"200", b"200", b"404"]


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("OPTIONS", 405), ("PUT", 405)])
def test_other_methods(server: RunningServer, method: str, status: int) -> None:
    answer = httpx.request(method, f"{server.url}/health")
    assert answer.status_code == status
    assert method != "HEAD" or answer.content == b""


def test_slow_headers_are_cut_off(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "HEADER_SECONDS", 0.3)
    with run_server(EngineCore(export, EngineOptions(kv_tokens=512))) as server:
        address = ("127.0.0.1", server.port)
        clients = [socket.create_connection(address, timeout=10) for _ in range(100)]
        for client in clients[50:]:
            client.sendall(b"GET /health HTTP/1.1\r\nHo")
        begin = time.monotonic()
        for client in clients:
            assert b"408" in read_all(client)
            client.close()
        assert time.monotonic() - begin < 5
        with httpx.Client(base_url=server.url) as good:  # idle between requests is not slow
            assert good.get("/health").status_code == 200
            time.sleep(0.5)
            assert good.get("/health").status_code == 200


def test_slow_bodies_are_cut_off(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_BODY_SECONDS", 0.3)
    with run_server(EngineCore(export, EngineOptions(kv_tokens=512))) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
            client.sendall(HEAD + b"Content-Length: 50\r\n\r\n{")
            assert read_all(client).startswith(b"HTTP/1.1 408")


def test_readers_that_stop_are_cut_off(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "STALL_SECONDS", 0.3)
    options = EngineOptions(kv_tokens=4096, max_running=16)
    with run_server(EngineCore(export, options)) as server:
        body = {"prompt": "a", "max_tokens": 180, "n": 16, "logprobs": 20, "stream": True}
        sent = json.dumps(body | {"ignore_eos": True}).encode()
        with socket.socket() as client:
            client.settimeout(15)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", server.port))
            client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(sent) + sent)
            while not server.core.scheduler.running:
                time.sleep(0.01)
            connections = 1
            deadline = time.monotonic() + 20
            while connections and time.monotonic() < deadline:
                small = httpx.post(
                    f"{server.url}/v1/completions", json={"prompt": "b", "max_tokens": 2}
                )
                assert small.status_code == 200, "others are served meanwhile"
                connections = int(server.core.busy)
            server.wait_until_idle()
            time.sleep(0.6)
            with pytest.raises(ConnectionError):  # reset, not the end of the stream
                data = read_all(client)
                raise AssertionError(data[-100:]) if b"[DONE]" in data else ConnectionError


def test_idle_connections_stay_open(export: Export) -> None:
    core = EngineCore(export, EngineOptions(kv_tokens=512))
    with run_server(core, keep_alive=1) as server:
        for pause, closed in ((0.3, False), (1.6, True)):
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
                client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                answer = b""
                while not answer.endswith(b"}"):
                    answer += client.recv(4096)
                assert b"200" in answer
                time.sleep(pause)
                client.setblocking(False)
                try:
                    assert (client.recv(1) == b"") == closed
                except BlockingIOError:
                    assert not closed


def test_key_is_required_everywhere_but_for_health(export: Export) -> None:
    core = EngineCore(export, EngineOptions(kv_tokens=512))
    with run_server(core, api_key="secret") as server, httpx.Client(base_url=server.url) as http:
        assert http.get("/health").status_code == 200
        for path in ("/metrics", "/v1/models", "/server_info", "/nothing", "/health_generate"):
            for headers in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "secret"}):
                answer = http.get(path, headers=headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (
                    401,
                    "invalid_api_key",
                )
        right = {"Authorization": "Bearer secret"}
        assert http.get("/v1/models", headers=right).status_code == 200
        assert http.post("/v1/completions", json={"prompt": "a"}, headers=right).status_code == 200
        weird = http.get("/v1/models", headers=[(b"authorization", "Bearer sécret".encode())])
        assert weird.status_code == 401


def test_draining_refuses_new_work(export: Export) -> None:
    drain = limits.Drain()
    core = EngineCore(export, EngineOptions(kv_tokens=512))
    with run_server(core, drain=drain) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as half:
            half.sendall(HEAD + b"Content-Length: 50\r\n\r\n{")
            time.sleep(0.2)
            drain.start()
            assert b"HTTP/1.1 503" in half.recv(4096)
        for path in ("/v1/completions", "/v1/chat/completions", "/generate"):
            answer = httpx.post(f"{server.url}{path}", json={})
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert httpx.get(f"{server.url}/health").status_code == 503


def metrics_of(server: RunningServer) -> dict[str, float]:
    found = httpx.get(f"{server.url}/metrics")
    assert found.headers["content-type"].startswith("text/plain")
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(found.text)
        for sample in family.samples
        if sample.labels.get("le", "+Inf") == "+Inf"
        if sample.labels.get("model_name") == "tiny"
    }


def test_metrics_count_what_happened(export: Export) -> None:
    core = EngineCore(export, EngineOptions(kv_tokens=4096))
    with run_server(core) as server:
        url = f"{server.url}/v1/completions"
        body: dict[str, Any] = {"prompt": [5] * 33, "max_tokens": 6, "ignore_eos": True, "n": 2}
        for stream in (False, True):
            assert httpx.post(url, json=body | {"stream": stream}).status_code == 200
        found = metrics_of(server)
        assert found["sglang:generation_tokens_total"] == 24
        assert found["sglang:prompt_tokens_total"] == 33 * 4
        assert found["sglang:cached_tokens_total"] == 32 * 3
        assert found["sglang:cache_hit_rate"] == pytest.approx(32 * 3 / (33 * 4))
        assert found["sglang:time_to_first_token_seconds_count"] == 2
        assert found["sglang:inter_token_latency_seconds_count"] == 4 * 5
        assert found["sglang:time_per_output_token_seconds_count"] == 4
        assert found["sglang:e2e_request_latency_seconds_count"] == 4
        assert found["sglang:num_requests_total"] == 4
        for name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
            assert found[name] == 0
        assert found["vllm:kv_cache_usage_perc"] == found["sglang:token_usage"] == 0
        with httpx.stream("POST", url, json=body | {"max_tokens": 150, "stream": True}) as answer:
            next(answer.iter_lines())
        server.wait_until_idle()
        deadline = time.monotonic() + 5
        while not (count := metrics_of(server)["sglang:num_aborted_requests_total"]):
            assert time.monotonic() < deadline
        assert count == 2


def test_health_and_streams_go_on_while_large_prompts_are_read(export: Export) -> None:
    """Also those that are refused in the end, however often."""
    core = EngineCore(export, EngineOptions(kv_tokens=4096))
    with run_server(core) as server:
        stop = threading.Event()
        contents = [
            json.dumps({"prompt": "a naïve text " * 200_000}).encode(),
            json.dumps({"prompt": [5] * 1_000_000}).encode(),
            b'{"prompt": ' + b"[" * 500_000 + b"]" * 500_000 + b"}",
        ]

        statuses = set[int]()

        def attack() -> None:
            with httpx.Client(base_url=server.url, timeout=60) as bad:
                while not stop.is_set():
                    for content in contents:
                        statuses.add(bad.post("/v1/completions", content=content).status_code)

        attackers = [threading.Thread(target=attack) for _ in range(3)]
        for attacker in attackers:
            attacker.start()
        delays = []
        with httpx.Client(base_url=server.url, timeout=60) as good:
            for _ in range(60):
                begin = time.monotonic()
                assert good.get("/health").status_code == 200
                delays.append(time.monotonic() - begin)
                time.sleep(0.02)
        stop.set()
        for attacker in attackers:
            attacker.join()
        assert statuses == {400}
        delays.sort()
        assert delays[-7] < 0.2, "a tenth may be late on a busy machine"

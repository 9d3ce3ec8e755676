"""Clients that violate HTTP, are slow, or stop reading; the key; draining."""

import asyncio
import gc
import json
import select
import socket
import struct
import threading
import time
import weakref
from collections.abc import Iterator

import httpx
import pytest

from serve.api import http_server, limits
from serve.engine.core import EngineCore, EngineOptions
from serve.engine.loading import Export
from tests.serve.conftest import RunningServer, run_server

LIMIT_S = 0.2
"""No prompt may delay other answers by more, on an idle machine."""
LIVENESS_S = 60.0
"""Longer than anything here may take on a busy machine; a limit for hanging."""
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
        for client in clients:
            assert b"408" in read_all(client)
            client.close()
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
    """With a reset, so that nothing is kept for them; others are served meanwhile."""
    monkeypatch.setattr(http_server, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(http_server, "SEND_BUFFER_BYTES", 4096)
    options = EngineOptions(kv_tokens=4096, max_running=16)
    with run_server(EngineCore(export, options)) as server:
        body = {"prompt": "a", "max_tokens": 50, "n": 16, "logprobs": 20, "stream": True}
        sent = json.dumps(body | {"ignore_eos": True}).encode()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", server.port))
            client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(sent) + sent)
            poll = select.poll()
            poll.register(client, select.POLLRDHUP)
            deadline = time.monotonic() + LIVENESS_S
            while not poll.poll(0):
                assert time.monotonic() < deadline, "the reader is still connected"
                small = {"prompt": "b", "max_tokens": 2}
                assert httpx.post(f"{server.url}/v1/completions", json=small).status_code == 200
            data = b""
            with pytest.raises(ConnectionResetError):
                while part := client.recv(65536):
                    data += part
        assert data.startswith(b"HTTP/1.1 200") and b"[DONE]" not in data
        server.wait_until_idle()


def test_idle_connections_stay_open(export: Export) -> None:
    core = EngineCore(export, EngineOptions(kv_tokens=512))
    with run_server(core, keep_alive=1) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=LIVENESS_S) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            begin = time.monotonic()
            found = read_all(client)
            assert found.endswith(b"}") and b"200" in found
            assert time.monotonic() - begin > 0.9, "closed after the time of the option, not before"


def test_connections_that_clients_reset_are_freed(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, not when they would have been idle for too long."""
    made = weakref.WeakSet[http_server.Connection]()
    begin = http_server.Connection.connection_made

    def seen(self: http_server.Connection, transport: asyncio.Transport) -> None:
        made.add(self)
        begin(self, transport)

    monkeypatch.setattr(http_server.Connection, "connection_made", seen)
    gc.freeze()  # collecting then visits only what is created from here on
    for _ in range(50):
        with socket.create_connection(("127.0.0.1", server.port), timeout=LIVENESS_S) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(4096)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    deadline = time.monotonic() + LIVENESS_S
    while len(made) > 5:
        assert time.monotonic() < deadline, "they are kept"
        time.sleep(0.1)
        gc.collect()


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
            half.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: 50\r\n\r\n{")
            assert half.recv(4096).startswith(b"HTTP/1.1 100"), "it reads the body"
            drain.start()
            assert b"HTTP/1.1 503" in half.recv(4096)
        for path in ("/v1/completions", "/v1/chat/completions", "/generate"):
            answer = httpx.post(f"{server.url}{path}", json={})
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert httpx.get(f"{server.url}/health").status_code == 503


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
            for _ in range(30):
                begin = time.monotonic()
                assert good.get("/health").status_code == 200
                delays.append(time.monotonic() - begin)
                time.sleep(0.02)
        stop.set()
        for attacker in attackers:
            attacker.join()
        assert statuses == {400}
        delays.sort()
        assert delays[-4] < 10 * LIMIT_S, "a tenth may be later on a busy machine"

"""At the limit of connections the one that has waited longest for its client makes room."""

import json
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from serve.api import http_server
from serve.engine.core import EngineCore, EngineOptions
from serve.engine.loading import Export
from tests.serve.conftest import RunningServer, run_server
from tests.serve.drive import slow_down

LIMIT = 4
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
Connect = Callable[..., socket.socket]


@pytest.fixture
def server(export: Export, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningServer]:
    core = EngineCore(export, EngineOptions(kv_tokens=4096))
    monkeypatch.setattr(http_server, "SEND_BUFFER_BYTES", 4096)
    with run_server(core) as running:
        monkeypatch.setattr(http_server, "MAX_CONNECTIONS", LIMIT)
        yield running


@pytest.fixture
def connect(server: RunningServer) -> Iterator[Connect]:
    """Opens a connection that the server has accepted."""
    with ExitStack() as stack:

        def make(receive_buffer: int | None = None) -> socket.socket:
            client = stack.enter_context(socket.socket())
            if receive_buffer is not None:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            client.settimeout(30)
            client.connect(("127.0.0.1", server.port))
            return client

        yield make


def stream_body(n: int = 1) -> bytes:
    fields = {"prompt": "a", "max_tokens": 50, "ignore_eos": True, "stream": True, "n": n}
    body = json.dumps(fields | ({"logprobs": 20} if n > 1 else {})).encode()
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


def healthy(client: socket.socket) -> bool:
    """Whether the server answers on this connection."""
    try:
        client.sendall(HEALTH)
        with client.makefile("rb") as answer:
            if not answer.readline().startswith(b"HTTP/1.1 200"):
                return False
            length = 0
            while line := answer.readline().strip():
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            return len(answer.read(length)) == length
    except OSError:
        return False


def test_the_oldest_idle_one_is_closed(connect: Connect) -> None:
    clients = []
    for _ in range(LIMIT):
        clients.append(connect())
        assert healthy(clients[-1])
    assert healthy(clients[0])  # now the second one has been idle longest
    assert healthy(connect())
    assert clients[1].recv(1) == b""
    assert healthy(connect())
    assert clients[2].recv(1) == b""
    assert healthy(clients[0]) and healthy(clients[3])


@pytest.mark.parametrize(
    ("begin", "status"),
    [
        (b"GET /health HTTP/1.1\r\nX: ", b"HTTP/1.1 503"),
        (HEAD + b"Content-Length: 50\r\n\r\n{", b"HTTP/1.1 503"),
    ],
    ids=["headers", "body"],
)
def test_a_slow_sender_makes_room(begin: bytes, status: bytes, connect: Connect) -> None:
    """Bytes that arrive now and then do not renew its place."""
    slow = connect()
    slow.sendall(begin)
    others = [connect() for _ in range(LIMIT - 1)]
    assert all(map(healthy, others))
    slow.sendall(b"a")
    assert all(map(healthy, others))
    assert healthy(connect())
    answer = slow.recv(4096)
    assert answer.startswith(status) and b"too many connections" in answer
    assert all(map(healthy, others))


def test_what_is_served_is_never_closed(server: RunningServer, connect: Connect) -> None:
    """Streams finish; with nothing else to close, a new connection is refused."""
    slow_down(server.core, 0.03)
    streams = [connect() for _ in range(LIMIT - 1)]
    for client in streams:
        client.sendall(stream_body())
        assert client.recv(12) == b"HTTP/1.1 200"
    idle = connect()
    assert healthy(idle)
    last = connect()
    last.sendall(stream_body())
    assert last.recv(12) == b"HTTP/1.1 200" and idle.recv(1) == b""
    refused = connect()
    assert refused.recv(4096).startswith(b"HTTP/1.1 503")
    for client in (*streams, last):
        data = b""
        while b"[DONE]" not in data:
            part = client.recv(65536)
            assert part, "a served connection was closed"
            data += part


def test_a_reader_that_stops_makes_room(server: RunningServer, connect: Connect) -> None:
    stalled = connect(4096)
    stalled.sendall(stream_body(16))
    assert stalled.recv(12) == b"HTTP/1.1 200"
    server.wait_until_idle(60)
    others = [connect() for _ in range(LIMIT - 1)]
    assert all(map(healthy, others))
    assert healthy(connect())
    with pytest.raises(ConnectionResetError):
        while stalled.recv(65536):
            pass
    assert all(map(healthy, others))


@pytest.mark.parametrize(
    ("soft", "hard", "expected", "raised"),
    [
        (1024, -1, 2048, (2304, -1)),
        (1024, 4096, 2048, (2304, 4096)),
        (-1, -1, 2048, None),
        (1024, 1024, 768, None),
        (90, 90, 45, None),
        (200, 400, 200, (400, 400)),
    ],
)
def test_connections_leave_files_for_the_rest(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, expected: int, raised: object
) -> None:
    """Without a file for the next connection nobody could connect, however many are idle."""
    found: list[object] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: found.append(limits))
    assert http_server.allow_connections() == expected
    assert found == ([] if raised is None else [raised])

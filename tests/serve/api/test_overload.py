"""Slow clients, and more requests than the server can serve."""

import json
import math
import select
import socket
import threading
import time
from contextlib import ExitStack
from http.client import HTTPConnection
from typing import Any

import httpx
import pytest

from serve.api import http_server, limits
from serve.engine.core import EngineCore, EngineOptions
from serve.engine.loading import Export
from serve.frontend.finish_rate import MAX_RETRY_S, FinishRate
from tests.serve.conftest import RunningServer, run_server
from tests.serve.drive import slow_down

LIVENESS_S = 60.0
"""Longer than everything here may take on a busy machine; a limit for hanging."""
RETRY_STEPS = 10
"""Steps of the engine after which a refused client sends again."""
GOOD = {"prompt": "The quick", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
SCRAPES = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 60
"""Pipelined: their answers fill the buffers of a client that does not read."""


def connect(port: int) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    return client


def text_of(http: httpx.Client) -> str:
    answer = http.post("/v1/completions", json=GOOD)
    assert answer.status_code == 200, answer.text
    found: str = answer.json()["choices"][0]["text"]
    return found


def test_250_slow_sockets_are_cut_off_and_disturb_no_one(
    export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Headers and bodies that arrive a byte at a time, and readers that stop."""
    for module, name in (
        (http_server, "HEADER_SECONDS"),
        (limits, "MAX_BODY_SECONDS"),
        (http_server, "STALL_SECONDS"),
    ):
        monkeypatch.setattr(module, name, 2.0)
    http_server.allow_connections()
    with ExitStack() as stack:
        server = stack.enter_context(run_server(EngineCore(export, EngineOptions(kv_tokens=512))))
        http = stack.enter_context(httpx.Client(base_url=server.url, timeout=LIVENESS_S))
        alone = text_of(http)
        slow = [stack.enter_context(connect(server.port)) for _ in range(250)]
        begins = [b"GET /health HTTP/1.1\r\nX: ", HEAD + b"Content-Length: 5000\r\n\r\n{", SCRAPES]
        kinds = [2 if i % 25 == 0 else i % 2 for i in range(len(slow))]
        for client, kind in zip(slow, kinds, strict=True):
            client.sendall(begins[kind])
        writers = [client for client, kind in zip(slow, kinds, strict=True) if kind < 2]
        left, n_good = set(slow), 0
        deadline = time.monotonic() + LIVENESS_S
        while left:
            assert time.monotonic() < deadline, f"{len(left)} are still connected"
            assert text_of(http) == alone
            n_good += 1
            if n_good % 3 == 1:  # every 0.3 s: each byte of each wakes the server
                dribble(writers, left)
            time.sleep(0.1)
            left -= {client for client in left if ended(client)}
        assert n_good > 3
        server.wait_until_idle()


def dribble(writers: list[socket.socket], left: set[socket.socket]) -> None:
    for client in writers:
        if client in left:
            try:
                client.send(b"a")
            except OSError:
                left.discard(client)  # reset by the server


def ended(client: socket.socket) -> bool:
    """Whether the server has closed the connection. Reads nothing of a long answer: the error of
    the poll is enough."""
    poll = select.poll()
    poll.register(client, select.POLLRDHUP)
    return bool(poll.poll(0))


class Clients:
    """Clients that send one request after another, in steps of the engine instead of seconds.

    A step begins when each client has its request in the engine or waits after a refusal, so a slow
    or busy machine changes no count.
    """

    def __init__(self, server: RunningServer, n: int) -> None:
        self._server, self._n = server, n
        self._changed = threading.Condition()
        self._resting: dict[int, int] = {}
        """Of each client that was refused, the step at which it sends again."""
        self._last = 0
        self._now = 0
        self.answers: list[tuple[int, str]] = []
        """Of each answer in time, the steps that it took and its text."""
        self.refusals: list[tuple[int, int, str]] = []
        """Status, Retry-After and code."""

    def run(self, steps: int) -> None:
        """Send during so many steps; later answers do not count."""
        self._last = steps
        self._server.thread._after_outputs = self._end_step
        threads = [threading.Thread(target=self._work, args=(i,)) for i in range(self._n)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._server.wait_until_idle()

    def _end_step(self) -> None:
        """Called by the engine between two steps."""
        deadline = time.monotonic() + LIVENESS_S
        with self._changed:
            self._now += 1
            self._changed.notify_all()
            while self._now < self._last and self._n_settled() < self._n:
                assert time.monotonic() < deadline
                self._changed.wait(0.001)

    def _n_settled(self) -> int:
        resting = sum(until > self._now for until in self._resting.values())
        return len(self._server.thread._deliver) + resting

    def _work(self, number: int) -> None:
        http = HTTPConnection("127.0.0.1", self._server.port, timeout=LIVENESS_S)
        while (sent := self._now) < self._last:
            http.request("POST", "/v1/completions", json.dumps(GOOD))
            answer = http.getresponse()
            content = json.load(answer)
            if answer.status != 200:
                after = int(answer.headers["retry-after"])
                self.refusals.append((answer.status, after, content["error"]["code"]))
                self._rest(number)
            elif (now := self._now) < self._last:
                self.answers.append((now - sent, content["choices"][0]["text"]))
        http.close()

    def _rest(self, number: int) -> None:
        with self._changed:
            until = self._resting[number] = self._now + RETRY_STEPS
            self._changed.wait_for(lambda: self._now >= min(until, self._last), LIVENESS_S)


def test_ten_times_the_load_keeps_the_goodput(export: Export) -> None:
    """Of four clients, as many as run, and of 40. Good are answers within the time of an unloaded
    one and of a full queue, two rounds of four: without a limit they would wait for nine."""
    options = EngineOptions(kv_tokens=2048, max_running=4, max_waiting=8)
    with run_server(EngineCore(export, options)) as server:
        few, many = Clients(server, 4), Clients(server, 40)
        few.run(36)
        many.run(36)
    unloaded = max(steps for steps, _ in few.answers)
    n_few, n_many = (
        sum(steps <= 3 * unloaded + 1 for steps, _ in clients.answers) for clients in (few, many)
    )
    print(f"\n{n_few} good answers of 4 clients, {n_many} of 40, {len(many.refusals)} refused")
    assert unloaded < 12 and n_few >= 12
    assert n_many >= n_few and n_many == len(many.answers)
    assert len({text for _, text in few.answers + many.answers}) == 1
    assert len(many.refusals) > 20 and not few.refusals
    for status, after, code in many.refusals:
        assert (status, code) == (429, "overloaded") and 1 <= after <= MAX_RETRY_S


def test_retry_after_is_the_time_of_half_the_queue(export: Export) -> None:
    options = EngineOptions(kv_tokens=512, max_running=1, max_waiting=40)
    with run_server(EngineCore(export, options)) as server, ExitStack() as stack:
        slow_down(server.core, 0.05)
        body: dict[str, Any] = GOOD | {"max_tokens": 4, "n": 41}
        content = json.dumps(body).encode()
        many = stack.enter_context(connect(server.port))
        many.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        scheduler = server.core.scheduler
        deadline = time.monotonic() + LIVENESS_S
        while not 0 < len(scheduler.waiting) <= 37:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with httpx.Client(base_url=server.url) as http:
            answer = http.post("/v1/completions", json=GOOD | {"n": 5})
        assert answer.status_code == 429
        # each needs four steps of 50 ms; by now the queue may have become shorter
        least = 4 * 0.05 * (len(scheduler.waiting) // 2)
        assert least > 1
        assert least <= int(answer.headers["retry-after"]) <= MAX_RETRY_S


def test_rate_of_ends() -> None:
    now = 100.0
    rate = FinishRate(lambda: now)
    assert rate.retry_after(1, 100) == 1, "nothing is known"
    now += 7.5
    assert rate.retry_after(1, 100) == 8, "nothing has ended for 7.5 s"
    for _ in range(5):
        now += 0.5
        rate.count()
    assert rate.seconds(10) == pytest.approx(20.0), "5 in 10 s"
    assert rate.retry_after(1, 10) == 10 and rate.retry_after(8, 10) == 16
    assert rate.retry_after(1, 0) == 2 and rate.retry_after(1, 10_000) == MAX_RETRY_S
    for _ in range(200):
        now += 0.1
        rate.count()
    assert rate.seconds(10) == pytest.approx(1.0), "recent ends only"
    now += 12.8
    assert rate.seconds(10) == pytest.approx(3.0), "it has become slower"
    rate.begin()
    now += 1.0
    rate.count()
    assert math.isclose(rate.seconds(1), 1.0), "idle time does not count"

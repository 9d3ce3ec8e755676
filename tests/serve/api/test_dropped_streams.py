"""Many concurrent streams, half of which their clients drop: no page is lost, and the others get
the text that they get alone."""

import asyncio
import json
import random
import socket
import struct
from typing import Any

import pytest

from serve.api.http_server import allow_connections
from serve.engine.core import EngineCore, EngineOptions
from serve.engine.loading import Export
from tests.serve.conftest import RunningServer, run_server
from tests.serve.drive import complete, greedy

N_TOKENS = 24
SIZES = EngineOptions(
    kv_tokens=384, page_size=4, max_running=32, max_waiting=2000, max_batch_tokens=256
)
"""Fewer tokens than the running requests need, in small pages: admission looks one page ahead, so
some are retracted."""


def make_calls(n: int) -> list[dict[str, Any]]:
    """Different calls of a stream: prompts share prefixes; half sample with a seed."""
    rng = random.Random(n)
    shared = [[rng.randrange(3, 250) for _ in range(40)] for _ in range(3)]
    calls = []
    for i in range(n):
        length = rng.choice([5, 17, 33, 40])
        prompt = [*rng.choice(shared)[:length], 3 + i % 240, 3 + i // 240]
        sampling = {"temperature": 0} if i % 2 else {"temperature": 1, "seed": i}
        body = {"prompt": prompt, "max_tokens": N_TOKENS, "ignore_eos": True, "stream": True}
        calls.append(body | sampling)
    return calls


def texts_alone(export: Export, calls: list[dict[str, Any]]) -> list[str]:
    """One after another, without a prefix cache."""
    core = EngineCore(export, EngineOptions(kv_tokens=4096, cache="naive"))
    found = []
    for call in calls:
        sampling = {name: call[name] for name in ("temperature", "seed") if name in call}
        found += complete(core, [call["prompt"]], greedy(N_TOKENS, **sampling))
    return [one.text for one in found]


async def stream(port: int, body: dict[str, Any], last: int | None, reset: bool) -> str | None:
    """The text of a whole stream; None if the client leaves after `last` events."""
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n" % len(content) + content
    )
    text, n_events = "", 0
    try:
        while n_events != last:
            line = await reader.readline()
            if not line or line.startswith(b"data: [DONE]"):
                assert line, "the stream ended early"
                return text
            if line.startswith(b"data: "):
                text += json.loads(line[6:])["choices"][0]["text"]
                n_events += 1
        return None
    finally:
        if reset:  # no orderly end of the connection
            own = writer.get_extra_info("socket")
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()


async def one_round(
    port: int, calls: list[dict[str, Any]], alone: list[str], seed: int, n_streams: int
) -> int:
    """Returns the number of streams that were not dropped."""
    rng = random.Random(seed)
    chosen = [rng.randrange(len(calls)) for _ in range(n_streams)]
    lasts = [rng.randrange(N_TOKENS) if i % 2 else None for i in range(n_streams)]
    found = await asyncio.gather(*(
        stream(port, calls[one], last, rng.random() < 0.5)
        for one, last in zip(chosen, lasts, strict=True)
    ))  # fmt: skip
    kept = [
        (text, alone[one])
        for text, one, last in zip(found, chosen, lasts, strict=True)
        if last is None
    ]
    assert all(text == expected for text, expected in kept)
    return len(kept)


def run_rounds(export: Export, n_streams: int, n_rounds: int, n_calls: int) -> None:
    allow_connections()  # both ends are in this process
    calls = make_calls(n_calls)
    alone = texts_alone(export, calls)
    core = EngineCore(export, SIZES)
    with run_server(core) as server:
        for seed in range(n_rounds):
            kept = asyncio.run(one_round(server.port, calls, alone, seed, n_streams))
            assert kept == n_streams // 2
            server.wait_until_idle(60)  # asserts that no page is lost, and none locked
            print(f"round {seed}: {kept} whole texts, {core.scheduler.n_retracted} retractions")
        assert core.scheduler.n_retracted > 0
        assert_empty(server)


def assert_empty(server: RunningServer) -> None:
    core = server.core
    server.thread.call(core.flush_cache)
    assert core.allocator.n_free == core.allocator.n_pages - 1
    assert not server.thread._deliver


def test_dropped_streams_lose_nothing(export: Export) -> None:
    run_rounds(export, n_streams=40, n_rounds=1, n_calls=8)


@pytest.mark.slow
def test_twenty_rounds_of_a_thousand_streams(export: Export) -> None:
    run_rounds(export, n_streams=1000, n_rounds=20, n_calls=200)

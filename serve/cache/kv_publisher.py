"""Publishes events of the prefix cache over ZeroMQ, as vLLM does, with a second socket for replay.

A PUB socket sends `[topic, number, batch]`; the topic is empty, numbers are consecutive. A
subscriber that finds a gap sends the first number that it has not got, or 0 at its beginning, to
the ROUTER socket (`[b"", number]`) and gets `[b"", number, batch]` for each batch from there on,
then number -1. If old batches are no longer stored, it gets one batch that clears the index and
stores all blocks. Numbers are 8 bytes, big-endian. The first is the time in microseconds: so an
engine that has started again is one more gap, after which the index is cleared.

All memory is bounded: batches for replay by number and bytes, those on their way to a slow
subscriber by number (further ones are dropped, and it finds the gap). The engine never waits.
"""

import logging
import re
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec

from configs.errors import UserError
from serve.cache.kv_events import (
    MAX_TOKENS,
    AllBlocksCleared,
    BlockIndex,
    BlockRemoved,
    Event,
    EventBatch,
    stored_events,
)

log = logging.getLogger("serve")

_MOST_BATCHES = 10_000
_MOST_BYTES = 16 * 2**20
_HIGH_WATER = 1000
_MOST_REQUEST = 256
"""Bytes of a request for replay."""
_REPLAY_SECONDS = 2.0
"""A client that does not read what it requested is given up after this time."""
_POLL_MS = 200
_END = (-1).to_bytes(8, "big", signed=True)
_ENDPOINT = re.compile(r"tcp://([^/\s:]+|\[[^/\s]+\]):(\d{1,5}|\*)|ipc://\S+")
_INSTALL = '--kv-events needs pyzmq: pip install "pyzmq>=26,<28"'


def check_endpoints(endpoint: str, replay_endpoint: str, cache: str) -> None:
    """Raise UserError if these are no endpoints on which ZeroMQ can listen. cache: the option, of
    which only `radix` has events."""
    for option, given in (("--kv-events", endpoint), ("--kv-events-replay", replay_endpoint)):
        match = _ENDPOINT.fullmatch(given)
        port = match[2] if match is not None and match[2] not in (None, "*") else "0"
        if given and (match is None or int(port) > 65535):
            raise UserError(f"{option} {given}: must be like tcp://127.0.0.1:5557 or ipc:///path")
    if replay_endpoint and not endpoint:
        raise UserError("--kv-events-replay: needs --kv-events")
    if endpoint and cache != "radix":
        raise UserError(f"--kv-events: needs --cache radix, not {cache}")


class KvEventPublisher:
    """`BlockEvents` that are published in batches. Only the engine's thread calls it.

    Args:
        block_size: Tokens per block.
        endpoint: Where subscribers connect.
        replay_endpoint: Where they request what they missed; empty: nowhere.

    Raises UserError if it cannot listen there.
    """

    def __init__(self, block_size: int, endpoint: str, replay_endpoint: str = "") -> None:
        try:
            import zmq
        except ImportError:
            raise UserError(_INSTALL) from None
        self._zmq: Any = zmq
        self._context = zmq.Context()
        self._block_size = block_size
        self._pending: list[Event] = []
        self._encoder = msgspec.msgpack.Encoder()
        self._lock = threading.Lock()
        self._buffer: deque[tuple[int, bytes]] = deque()
        self._n_bytes = 0
        self._index = BlockIndex()
        self._next = time.time_ns() // 1000
        self._closed = threading.Event()
        self._replay_thread: threading.Thread | None = None
        try:
            self._publications = self._listen(zmq.PUB, "--kv-events", endpoint)
            if replay_endpoint:
                replay = self._listen(zmq.ROUTER, "--kv-events-replay", replay_endpoint)
                self.replay_endpoint = replay.getsockopt_string(zmq.LAST_ENDPOINT)
                self._replay_thread = threading.Thread(
                    target=self._serve_replay, args=(replay,), name="kv replay", daemon=True
                )
        except UserError:
            self._context.destroy(linger=0)
            raise
        self.endpoint = self._publications.getsockopt_string(zmq.LAST_ENDPOINT)
        if self._replay_thread is not None:
            self._replay_thread.start()
        self.cleared()
        self.flush()

    def stored(self, parent: int | None, hashes: Sequence[int], key: bytes) -> None:
        self._pending += stored_events(parent, hashes, key, self._block_size)

    def removed(self, hashes: Sequence[int]) -> None:
        for at in range(0, len(hashes), MAX_TOKENS):
            self._pending.append(BlockRemoved(list(hashes[at : at + MAX_TOKENS])))

    def cleared(self) -> None:
        self._pending.append(AllBlocksCleared())

    def flush(self) -> None:
        """Publish what happened since the last call, in messages of limited size."""
        while self._pending:
            n = size = 0
            while n < len(self._pending) and (not n or size < MAX_TOKENS):
                size += _size(self._pending[n])
                n += 1
            some, self._pending = self._pending[:n], self._pending[n:]
            self._publish(some)

    def close(self) -> None:
        """End its thread and sockets."""
        self._closed.set()
        if self._replay_thread is not None:
            self._replay_thread.join()
        self._publications.close(linger=0)
        self._context.term()

    def _publish(self, events: list[Event]) -> None:
        payload = self._encoder.encode(EventBatch(time.time(), events))
        with self._lock:
            number, self._next = self._next, self._next + 1
            self._buffer.append((number, payload))
            self._n_bytes += len(payload)
            while len(self._buffer) > 1 and (
                len(self._buffer) > _MOST_BATCHES or self._n_bytes > _MOST_BYTES
            ):
                self._n_bytes -= len(self._buffer.popleft()[1])
            self._index.apply(events)
        # a PUB socket never waits: it drops the message for subscribers that are too far behind
        self._publications.send_multipart([b"", number.to_bytes(8, "big"), payload])

    def _listen(self, kind: int, option: str, endpoint: str) -> Any:
        made = self._context.socket(kind)
        made.setsockopt(self._zmq.SNDHWM, _HIGH_WATER)
        made.setsockopt(self._zmq.MAXMSGSIZE, _MOST_REQUEST)
        made.setsockopt(self._zmq.LINGER, 0)
        made.setsockopt(self._zmq.IPV6, "[" in endpoint)
        if kind == self._zmq.ROUTER:
            made.setsockopt(self._zmq.ROUTER_MANDATORY, 1)  # else it drops what does not fit
            made.setsockopt(self._zmq.SNDTIMEO, int(1000 * _REPLAY_SECONDS))
        try:
            made.bind(endpoint)
        except self._zmq.ZMQError as error:
            raise UserError(f"{option} {endpoint}: cannot listen there: {error.strerror}") from None
        return made

    def _serve_replay(self, replay: Any) -> None:
        while not self._closed.is_set():
            try:
                if not replay.poll(_POLL_MS):
                    continue
                client, *request = replay.recv_multipart()
                if len(request) == 2 and len(request[1]) == 8:
                    self._replay(replay, client, request[0], int.from_bytes(request[1], "big"))
            except self._zmq.ZMQError as error:  # the client is gone, or does not read
                log.info("a replay of KV events ends: %s", error.strerror)
        replay.close(linger=0)

    def _replay(self, replay: Any, client: bytes, delimiter: bytes, first: int) -> None:
        with self._lock:
            if first >= self._buffer[0][0]:
                batches = [one for one in self._buffer if one[0] >= first]
            else:
                everything = EventBatch(time.time(), self._index.events())
                batches = [(self._next - 1, msgspec.msgpack.encode(everything))]
        for number, payload in batches:
            replay.send_multipart([client, delimiter, number.to_bytes(8, "big"), payload])
            if self._closed.is_set():
                return
        replay.send_multipart([client, delimiter, _END, b""])


def _size(event: Event) -> int:
    """Numbers that an event has."""
    if isinstance(event, AllBlocksCleared):
        return 1
    more = [] if isinstance(event, BlockRemoved) else event.token_ids
    return len(event.block_hashes) + len(more)

"""An index rebuilt from the events equals the radix tree, whenever it begins and whatever it
loses."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import zmq

from configs.errors import UserError
from serve.cache import kv_publisher
from serve.cache.allocator import NULL_PAGE
from serve.cache.kv_events import AllBlocksCleared, BlockIndex, BlockStored, EventBatch
from serve.cache.kv_publisher import KvEventPublisher
from serve.cache.radix import Node, RadixCache
from serve.engine.core import EngineCore, EngineOptions
from serve.engine.loading import Export
from serve.engine.request import SamplingParams
from tests.serve.conftest import run_server
from tests.serve.hash_runner import make_core
from tests.serve.traffic import Workload

LIVENESS_S = 20.0
ANY = "tcp://127.0.0.1:*"
Blocks = dict[tuple[int, ...], tuple[int, ...]]
"""All tokens up to the end of a block, to its own."""


def tree_of(cache: RadixCache) -> Blocks:
    """The blocks of a tree, without its hashes."""
    found: Blocks = {}
    size = cache.page_size

    def visit(node: Node, before: tuple[int, ...]) -> None:
        tokens = before + tuple(memoryview(node.key).cast("i"))
        for n, page in enumerate(node.pages, 1):
            end = len(before) + n * size
            if page != NULL_PAGE:
                found[tokens[:end]] = tokens[end - size : end]
        for child in node.children.values():
            visit(child, tokens)

    visit(cache.root, ())
    return found


def blocks_of(index: BlockIndex) -> Blocks:
    """The same of an index, by following the parents. Blocks before a stored one may be gone if the
    model has a window: then their tokens are not known."""

    def path(block: int | None) -> tuple[int, ...]:
        parts: list[tuple[int, ...]] = []
        while block is not None and block in index.blocks:
            block, tokens = index.blocks[block]
            parts.insert(0, tokens)
        return tuple(token for part in parts for token in part)

    return {path(block): tokens for block, (_, tokens) in index.blocks.items()}


class Subscriber:
    """An index of a router, by the protocol of vLLM's publisher."""

    def __init__(self, publisher: KvEventPublisher) -> None:
        self.index = BlockIndex()
        self.n_lost = self.n_replayed = 0
        self.next = 0
        self._replay_endpoint = publisher.replay_endpoint
        self._context = zmq.Context()
        self._context.setsockopt(zmq.LINGER, 0)  # closing waits for no peer
        self.live = self._context.socket(zmq.SUB)
        self.live.connect(publisher.endpoint)
        self.live.subscribe(b"")
        self.decoder = msgspec.msgpack.Decoder(EventBatch)

    def close(self) -> None:
        self._context.destroy(linger=0)

    def read(self, loses: Callable[[], bool] = lambda: False) -> None:
        """Apply what has arrived. loses: whether a message is lost."""
        while self.live.poll(0):
            topic, number, payload = self.live.recv_multipart()
            assert topic == b""
            if loses():
                self.n_lost += 1
                continue
            self._take(int.from_bytes(number, "big"), payload)

    def catch_up(self) -> None:
        """Request what is missing, also if no message shows that it is."""
        self.read()
        self._replay()

    def _take(self, number: int, payload: bytes) -> None:
        if number > self.next:
            self._replay()
        if number == self.next:  # otherwise it was replayed
            self.next = number + 1
            self.index.apply(self.decoder.decode(payload).events)

    def _replay(self) -> None:
        context = zmq.Context()
        try:  # a DEALER reads many answers to one request
            with context.socket(zmq.DEALER) as dealer:
                dealer.connect(self._replay_endpoint)
                dealer.send_multipart([b"", self.next.to_bytes(8, "big")])
                while True:
                    assert dealer.poll(int(1000 * LIVENESS_S)), "no answer"
                    delimiter, number, payload = dealer.recv_multipart()
                    assert delimiter == b""
                    if number == (-1).to_bytes(8, "big", signed=True):
                        return
                    batch = self.decoder.decode(payload)
                    assert int.from_bytes(number, "big") >= self.next
                    self.next = int.from_bytes(number, "big") + 1
                    self.index.apply(batch.events)
                    self.n_replayed += 1
        finally:
            context.destroy(linger=0)


@contextmanager
def subscribed(publisher: KvEventPublisher) -> Iterator[Subscriber]:
    one = Subscriber(publisher)
    try:
        yield one
    finally:
        one.close()


def make(window: int = 0, **options: Any) -> tuple[EngineCore, KvEventPublisher, RadixCache]:
    core = make_core(window, kv_events=ANY, kv_events_replay=ANY, **options)
    assert core.kv_events is not None and isinstance(core.pages.prefixes, RadixCache)
    return core, core.kv_events, core.pages.prefixes


def traffic(core: EngineCore, seed: int, n: int, after: Callable[[], None]) -> None:
    """Random requests with shared prefixes, aborts, eviction, retractions, and a rare flush."""
    work = Workload(seed, n)
    rng = random.Random(seed)
    assert core.kv_events is not None
    while work.left > 0 or core.busy:
        while work.left > 0 and rng.random() < 0.25:
            core.scheduler.add(work.next(core).requests)
        core.step()
        alive = [*core.scheduler.running, *core.scheduler.waiting]
        if alive and rng.random() < 0.02:
            core.scheduler.finish(rng.choice(alive), "cancelled")
        if rng.random() < 0.002:
            core.flush_cache()
        if rng.random() < 0.02:
            core.drain()
            if core.scheduler.running:
                core.scheduler._retract(rng.choice(core.scheduler.running))
        core.kv_events.flush()
        after()


@pytest.mark.parametrize(
    ("page_size", "window"),
    [
        (4, 0), (5, 20),
        pytest.param(5, 0, marks=pytest.mark.slow), pytest.param(4, 20, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_an_index_equals_the_tree(page_size: int, window: int) -> None:
    """One is there from the start, one begins in the middle, one loses a third of the messages."""
    core, publisher, tree = make(window, kv_tokens=600, page_size=page_size, max_running=4)
    rng = random.Random(page_size)
    with subscribed(publisher) as first, subscribed(publisher) as lossy:
        steps = 0

        def after() -> None:
            nonlocal steps
            steps += 1
            if steps % 20 == 0:
                first.read()
                lossy.read(lambda: rng.random() < 0.3)

        traffic(core, 1, 40, after)
        with subscribed(publisher) as late:
            traffic(core, 2, 20, after)
            time.sleep(0.05)
            late.read()
            for one in (first, lossy, late):
                one.catch_up()
                assert one.index.blocks == publisher._index.blocks
                if not window:
                    assert blocks_of(one.index) == tree_of(tree)
                assert sorted(t for _, t in one.index.blocks.values()) == sorted(
                    tree_of(tree).values()
                )
            assert lossy.n_lost and lossy.n_replayed and late.n_replayed
    assert core.pages.prefixes.version > 50 and tree_of(tree) and core.scheduler.n_retracted
    core.flush_cache()
    publisher.flush()
    assert not publisher._index.blocks
    core.close()


def test_new_weights_clear_the_index(make_core: Any, export_folder: Any) -> None:
    core = make_core(kv_events=ANY, kv_events_replay=ANY)
    (request,) = core.make_requests([5] * 40, SamplingParams(max_tokens=2, ignore_eos=True))
    core.scheduler.add([request])
    while core.busy:
        core.step()
    publisher = core.kv_events
    publisher.flush()
    assert len(publisher._index.blocks) == 2
    with subscribed(publisher) as one:
        one.catch_up()
        assert len(one.index.blocks) == 2
        core.update_weights(export_folder)
        publisher.flush()
        one.catch_up()
        assert not one.index.blocks
    core.close()


def test_a_server_publishes_without_further_requests(export: Export) -> None:
    """What an answer, a client that leaves, and a flush change is published at once."""
    options = EngineOptions(kv_tokens=1024, kv_events=ANY, kv_events_replay=ANY)
    core = EngineCore(export, options)
    publisher, tree = core.kv_events, core.pages.prefixes
    assert publisher is not None and isinstance(tree, RadixCache)
    with run_server(core) as server, subscribed(publisher) as one:

        def wait_for_equality() -> None:
            server.wait_until_idle()
            deadline = time.monotonic() + LIVENESS_S
            while blocks_of(one.index) != tree_of(tree):
                assert time.monotonic() < deadline
                one.catch_up()

        with httpx.Client(base_url=server.url, timeout=LIVENESS_S) as http:
            body = {"prompt": [5] * 40, "max_tokens": 60, "ignore_eos": True}
            assert http.post("/v1/completions", json=body).status_code == 200
            wait_for_equality()
            assert len(one.index.blocks) == 6
            body |= {"prompt": [6] * 40, "max_tokens": 150, "stream": True}
            with http.stream("POST", "/v1/completions", json=body) as answer:
                next(answer.iter_lines())
            wait_for_equality()
            assert len(one.index.blocks) > 6
            assert http.get("/flush_cache").status_code == 200
            wait_for_equality()
            assert not one.index.blocks


@pytest.mark.parametrize(("name", "most"), [("_MOST_BATCHES", 5), ("_MOST_BYTES", 2000)])
def test_what_is_no_longer_stored_is_replaced_by_everything(
    monkeypatch: pytest.MonkeyPatch, name: str, most: int
) -> None:
    """The buffer is bounded, and a late index is whole nevertheless."""
    monkeypatch.setattr(kv_publisher, name, most)
    core, publisher, tree = make(kv_tokens=400, page_size=4)
    start = publisher._buffer[0][0]
    traffic(core, 3, 20, lambda: None)
    assert publisher._buffer[0][0] > start + 5
    assert len(publisher._buffer) <= 5 or publisher._n_bytes <= 2000
    assert publisher._n_bytes == sum(len(payload) for _, payload in publisher._buffer)
    with subscribed(publisher) as late:
        late.catch_up()
        assert late.n_replayed == 1
        assert blocks_of(late.index) == tree_of(tree)
        traffic(core, 4, 5, late.read)
        late.catch_up()
        assert blocks_of(late.index) == tree_of(tree)
    core.close()


def test_a_subscriber_that_never_reads_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither time of the engine nor memory without bound; nor does a replay that nobody reads."""
    monkeypatch.setattr(kv_publisher, "_REPLAY_SECONDS", 0.2)
    publisher = KvEventPublisher(4, ANY, ANY)
    with subscribed(publisher) as one:
        one.live.poll(200)
        with one._context.socket(zmq.DEALER) as stuck:
            stuck.setsockopt(zmq.RCVHWM, 1)
            stuck.connect(publisher.replay_endpoint)
            key = bytes(4 * 4 * 1024)
            begin = time.process_time()
            longest = 0.0
            for n in range(1200):
                before = time.monotonic()
                publisher.stored(None, range(n, n + 1024), key)
                publisher.flush()
                longest = max(longest, time.monotonic() - before)
            assert time.process_time() - begin < 20
            stuck.send_multipart([b"", bytes(8)])
            for bad in ([b"x"], [b"", b"1"], [b"", bytes(300)], [b"", bytes(8), b""]):
                stuck.send_multipart(bad)
            one.catch_up()
        assert publisher._n_bytes <= kv_publisher._MOST_BYTES
        assert longest < 2.0, "it waited for a subscriber"
    publisher.close()


def test_an_index_survives_a_new_engine(tmp_path: Path) -> None:
    """At the same endpoints; what it publishes before the connection is lost."""
    endpoints = f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay"
    publisher = KvEventPublisher(1, *endpoints)
    with subscribed(publisher) as one:
        for n in range(9):
            publisher.stored(None, [n], bytes(4))
            publisher.flush()
        one.catch_up()
        deadline = time.monotonic() + LIVENESS_S
        while not one.live.poll(0):  # it is connected
            publisher.removed([8])
            publisher.flush()
            assert time.monotonic() < deadline
        one.read()
        assert one.index.blocks.keys() == set(range(8))
        publisher.close()
        publisher = KvEventPublisher(1, *endpoints)
        while 99 not in one.index.blocks:
            publisher.stored(None, [99], bytes(4))
            publisher.flush()
            time.sleep(0.01)
            one.read()
            assert time.monotonic() < deadline
        assert one.index.blocks.keys() == {99}
    publisher.close()


def test_messages_are_small() -> None:
    """A prompt of 100,000 tokens is many messages, each after the other."""
    publisher = KvEventPublisher(16, ANY, ANY)
    publisher.stored(7, range(10, 6260), bytes(4 * 100_000))
    publisher.removed(range(10, 6260))
    publisher.flush()
    sizes = [len(payload) for _, payload in publisher._buffer]
    assert len(sizes) > 20 and max(sizes) < 64 * 2**10
    events = [
        event
        for _, payload in publisher._buffer
        for event in msgspec.msgpack.decode(payload, type=EventBatch).events
    ]
    stored = [event for event in events if isinstance(event, BlockStored)]
    assert isinstance(events[0], AllBlocksCleared)
    assert [s.parent_block_hash for s in stored] == [7] + [s.block_hashes[-1] for s in stored[:-1]]
    assert not publisher._index.blocks
    publisher.close()


def test_the_format_is_that_of_vllm() -> None:
    publisher = KvEventPublisher(2, ANY)
    publisher.stored(None, [2**64 - 1], b"\1\0\0\0\2\0\0\0")
    publisher.flush()
    ts, (cleared,) = msgspec.msgpack.decode(publisher._buffer[0][1])
    assert abs(ts - time.time()) < 60 and cleared == {"type": "AllBlocksCleared"}
    (stored,) = msgspec.msgpack.decode(publisher._buffer[1][1])[1]
    assert stored == {
        "type": "BlockStored", "block_hashes": [2**64 - 1], "parent_block_hash": None,
        "token_ids": [1, 2], "block_size": 2, "lora_id": None, "medium": None, "lora_name": None,
    }  # fmt: skip
    publisher.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_events": "127.0.0.1:5557"}, "--kv-events 127.0.0.1:5557: must be like tcp://"),
        ({"kv_events": "tcp://127.0.0.1:70000"}, "must be like tcp://127.0.0.1:5557"),
        ({"kv_events_replay": ANY}, "--kv-events-replay: needs --kv-events"),
        ({"kv_events": ANY, "cache": "naive"}, "--kv-events: needs --cache radix, not naive"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EngineOptions(**options)


def test_a_used_port_takes_one_line() -> None:
    publisher = KvEventPublisher(4, ANY)
    with pytest.raises(UserError, match="cannot listen there: Address already in use"):
        KvEventPublisher(4, publisher.endpoint)
    publisher.close()

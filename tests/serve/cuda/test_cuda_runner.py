"""The runner for CUDA on a CPU: the references of its kernels, its buffers without graphs.

Its logits are compared with one forward pass of the training core over each whole request, its
tokens with those of the training model.
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import device
from models.decoder import Decoder
from serve.cache.kv_cache import KvCache
from serve.cuda.attention import DeviceBatch
from serve.cuda.decode_graphs import DecodeGraphs, Hidden, batch_sizes
from serve.cuda.runner import CudaRunner
from serve.engine.batch import ForwardBatch, lay_out
from serve.engine.core import EngineCore, EngineOptions
from serve.engine.loading import Export
from tests.models.families import FAMILIES
from tests.models.test_invariance import lively, logits
from tests.serve.drive import complete, greedy
from tests.serve.test_runner import SERVED, random_sequences
from tests.serve.test_runner import Sequence as Request

TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 4e-2}
"""Of the norm of a row: sums are in another order, and in bf16 MLA rounds its queries. In fp32 most
rows differ by 2e-6; a few of gpt-oss, whose logits almost cancel, by 1.1e-5 with AVX2."""
CPU = torch.device("cpu")


def make_runner(decoder: Decoder, dtype: torch.dtype, size: int, max_running: int) -> CudaRunner:
    cache = KvCache(decoder.config, 600 // size + 8, size, dtype, CPU)
    return CudaRunner(decoder, cache, max_running, cache.pages_for(300))


def compute(runner: CudaRunner, requests: Sequence[Request], counts: Sequence[int]) -> None:
    """A step: the next `counts` tokens of each request."""
    chunks, owners = [], []
    for s, n in zip(requests, counts, strict=True):
        end = min(s.computed + n, len(s.tokens))
        if end > s.computed:
            chunks.append((s.tokens[s.computed : end], s.computed, s.pages))
            owners += [(s, position) for position in range(s.computed, end)]
            s.computed = end
    if not chunks:
        return
    batch = lay_out(chunks, runner.cache.page_size, range(len(owners)))
    for (s, position), row in zip(owners, runner.run(batch), strict=True):
        s.rows[position] = row


def assert_logits_of_training(
    decoder: Decoder, dtype: torch.dtype, requests: Sequence[Request]
) -> None:
    for s in requests:
        ours = torch.stack([s.rows[p] for p in range(len(s.tokens))])
        padded = torch.tensor([s.tokens + [0] * (-len(s.tokens) % 8)])
        expected = logits(decoder, padded)[0, : len(s.tokens)].float()
        errors = (ours - expected).norm(dim=1) / expected.norm(dim=1)
        # in bf16 the rounding changes the experts of a few tokens
        worst = errors.max() if dtype == torch.float32 else errors.median()
        assert worst < TOLERANCE[dtype], len(s.tokens)


@pytest.mark.parametrize(
    ("name", "dtype", "size"),
    [  # by default every two values of different parameters
        pytest.param(name, dtype, size, marks=[pytest.mark.slow] * ((i + j + k) % 2))
        for i, name in enumerate(SERVED)
        for j, dtype in enumerate([torch.float32, torch.bfloat16])
        for k, size in enumerate([5, 16])
    ],
)
def test_logits_of_training(name: str, dtype: torch.dtype, size: int) -> None:
    """Prompts in chunks, some together with decodes, then decodes in padded buckets."""
    decoder = lively(FAMILIES[name], dtype)
    runner = make_runner(decoder, dtype, size, 4)
    requests = random_sequences(random.Random(name), runner.cache, [30, 4, 80])
    compute(runner, requests, [20, 1, 33])
    compute(runner, requests, [1, 1, 40])
    for _ in range(10):
        compute(runner, requests, [1, 1, 1])
    assert all(s.computed == len(s.tokens) for s in requests[1:])
    requests[0].tokens = requests[0].tokens[: requests[0].computed]
    assert_logits_of_training(decoder, dtype, requests)


def decodes(runner: CudaRunner, n: int) -> tuple[list[Request], ForwardBatch]:
    """n requests of 20 tokens, all but the last computed, and the step of these."""
    requests = random_sequences(random.Random(0), runner.cache, [20] * n)
    compute(runner, requests, [19] * n)
    chunks = [(s.tokens[19:], 19, s.pages) for s in requests]
    return requests, lay_out(chunks, runner.cache.page_size, range(n))


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss", "deepseek-v3"])
def test_padding_writes_nothing(name: str) -> None:
    """Three requests in a bucket of four, after a step of four: logits are those without graphs,
    and the cache changes in the slots of the three tokens only."""
    decoder = lively(FAMILIES[name], torch.float32)
    runner = make_runner(decoder, torch.float32, 5, 4)
    _, four = decodes(runner, 4)
    runner.run(four)
    requests, batch = decodes(runner, 3)
    before = [tensor.clone() for tensor in runner.cache.tensors]
    ours, graphs = runner.run(batch), runner.graphs
    after = [tensor.clone() for tensor in runner.cache.tensors]
    runner.graphs = None
    assert (ours - runner.run(batch)).norm() < 1e-5 * ours.norm()
    assert graphs is not None and graphs.fits(batch)
    written = {s.pages[19 // 5] for s in requests}
    for old, new in zip(before, after, strict=True):
        changed = (old != new) & ~(old.isnan() & new.isnan())
        pages = changed.transpose(0, 1).flatten(1).any(1).nonzero().flatten().tolist()
        assert set(pages) == written
        assert not new[:, 0].any(), "the null page"


def test_only_decodes_that_fit_are_graphs() -> None:
    decoder = lively(FAMILIES["qwen3"], torch.float32)
    runner = make_runner(decoder, torch.float32, 5, 2)
    graphs = runner.graphs
    assert graphs is not None
    page = [[b + 1] for b in range(3)]
    two = lay_out([([1], 0, page[0]), ([2], 3, page[1])], 5, [0, 1])
    three = lay_out([([b], 0, page[b]) for b in range(3)], 5, [0])
    chunk = lay_out([([1], 0, page[0]), ([2, 3], 0, page[1])], 5, [0])
    assert [graphs.fits(batch) for batch in (two, three, chunk)] == [True, False, False]


def test_sizes() -> None:
    assert batch_sizes(1) == [1]
    assert batch_sizes(6) == [1, 2, 4, 6]
    assert batch_sizes(16) == [1, 2, 4, 8, 16]
    assert batch_sizes(40) == [1, 2, 4, 8, 16, 32, 40]


@pytest.mark.parametrize(
    "options",
    [
        {"max_running": 6},
        {"max_running": 4, "max_batch_tokens": 7, "page_size": 3},
        {"max_running": 8, "kv_tokens": 96, "page_size": 4},
        {"max_running": 5, "overlap": "on"},
    ],
    ids=["batched", "chunked", "preempted", "overlapped"],
)
def test_greedy_equals_training_model(
    export: Export,
    greedy_reference: Callable[[Sequence[int], int], list[int]],
    options: dict[str, Any],
) -> None:
    core = EngineCore(export, EngineOptions(**{"kv_tokens": 4096, **options}))
    max_pages = core.cache.pages_for(export.max_length)
    runner = CudaRunner(export.model, core.cache, core.options.max_running, max_pages)
    core.executor.runner = runner
    padded: list[int] = []
    forward = runner._forward

    def spy(batch: DeviceBatch, *context: Any) -> Hidden:
        padded.append(int((batch.slots < 0).sum()))
        return forward(batch, *context)

    assert runner.graphs is not None
    runner.graphs.forward = spy
    runner._forward = spy  # type: ignore[assignment, method-assign]
    rng = random.Random(0)
    texts = [[rng.randrange(1, 320) for _ in range(rng.randint(1, 30))] for _ in range(7)]
    found = complete(core, texts, [greedy(n) for n in range(5, 12)])
    for one, text in zip(found, texts, strict=True):
        assert one.tokens == greedy_reference(text, 12)[: len(one.tokens)]
    core.close()
    assert any(padded) and 0 in padded, "buckets with and without padding"


class FakeGraph:
    """Repeats the forward pass into the tensors of the captured result."""

    recording: "FakeGraph | None" = None

    def __init__(self) -> None:
        self.shared: object = None
        self.pass_: Callable[[], Hidden] | None = None
        self.result: Hidden | None = None

    def pool(self) -> object:
        return self.shared or self

    def replay(self) -> None:
        assert self.pass_ is not None and self.result is not None
        for old, new in zip(self.result, self.pass_(), strict=True):
            old.copy_(new)


def test_captured_graphs_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA's functions replaced: each size is run once, then captured, in one pool; a step
    replays, and reads the result of the capture."""
    order: list[tuple[int, bool]] = []
    pools: list[object] = []

    @contextlib.contextmanager
    def capturing(graph: FakeGraph, pool: object) -> Iterator[None]:
        pools.append(pool)
        graph.shared = pool
        FakeGraph.recording = graph
        yield
        FakeGraph.recording = None

    class FakeStream:
        def wait_stream(self, other: object) -> None:
            assert isinstance(other, FakeStream)

    monkeypatch.setattr(device, "launching_on", lambda x: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())

    def compute_rows(batch: DeviceBatch) -> Hidden:
        lengths = batch.requests.key_lengths
        x = torch.stack([batch.tokens, batch.positions, batch.slots, lengths, lengths * 0 + 7])
        return x.T.float(), torch.zeros(1)

    def forward(batch: DeviceBatch) -> Hidden:
        graph, result = FakeGraph.recording, compute_rows(batch)
        order.append((len(batch.tokens), graph is not None))
        if graph is not None:
            graph.pass_, graph.result = lambda: compute_rows(batch), result
        return result

    graphs = DecodeGraphs.create(forward, 4, 5, 8, CPU)
    assert not order, "a CPU captures nothing"
    graphs.capture()
    assert order == [(n, captured) for n in (4, 2, 1) for captured in (False, True)]
    assert pools[0] is None and pools[1] is pools[2] is not None
    for n in (3, 1, 4):
        chunks = [([b + 50], 10 * b + 3, list(range(1, 9))) for b in range(n)]
        rows: Tensor = graphs.run(lay_out(chunks, 5, range(n)))[0]
        slots = [5 * (1 + (10 * b + 3) // 5) + (10 * b + 3) % 5 for b in range(n)]
        expected = [[b + 50, 10 * b + 3, slots[b], 10 * b + 4, 7] for b in range(n)]
        padding = [[expected[-1][0], 0, -1, 0, 7]] * (len(rows) - n)
        assert rows.tolist() == expected + padding
    assert len(order) == 6, "steps run no further pass"

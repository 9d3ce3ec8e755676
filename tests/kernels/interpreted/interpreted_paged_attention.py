"""Interpreter tests: attention over pages, and writing to them."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kernels.paged_attention import paged_attention as paged
from kernels.paged_attention import paged_attention_triton
from kernels.paged_attention.batch import PagedBatch
from tests.kernels.interpreted.lane import kernels_on_cpu, relative

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3}
"""Of the norm; for bf16 some roundings (2^-9), of probabilities and results."""


@dataclass(frozen=True)
class Heads:
    """H query heads, G key/value heads, widths of keys and values."""

    H: int
    G: int
    C: int
    V: int


SMALL = Heads(4, 2, 16, 16)
HEADS = [
    SMALL, Heads(5, 1, 10, 6), Heads(3, 3, 80, 80),
    pytest.param(Heads(40, 2, 24, 24), marks=pytest.mark.slow),  # LATENTS have as many
]  # fmt: skip
LATENTS = [Heads(4, 1, 22, 14), Heads(70, 1, 40, 32), Heads(1, 1, 9, 8)]
"""One key per token, whose first V numbers are the value."""
REQUESTS = {
    "decodes": ([1, 1, 1, 1], [40, 0, 1, 200], 4),
    "chunks": ([3, 0, 19, 1], [3, 0, 71, 50], 0),
    "mixed": ([1, 1, 20, 0, 2], [131, 7, 40, 12, 67], 2),
    "one": ([1], [65], 1),
    "padded": ([1, 1, 5], [0, 9, 0], 2),
}
"""Rows of each request, its keys, and the number of decodes."""
KINDS = [*list(REQUESTS)[:3], pytest.param("one", marks=pytest.mark.slow), "padded"]
"""`test_other_requests_do_not_matter` has requests alone."""
LOCAL = {"full": (0, 0), "window": (21, 0), "chunk": (0, 37)}


@pytest.fixture(autouse=True)
def small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of 64 keys up to 2 of them, so that 131 keys are two splits of 128."""
    monkeypatch.setattr(paged_attention_triton, "_SPLIT", 64)
    monkeypatch.setattr(paged_attention_triton, "_SPLITS", 2)


def make_batch(rows: list[int], lengths: list[int], n_decodes: int, size: int) -> PagedBatch:
    """Pages in random order; page 0 and the pages of no request are in no table."""
    held = [-(-length // size) for length in lengths]
    free = (torch.randperm(sum(held) + 3) + 1).tolist()
    table = torch.full((len(rows), max(max(held), 1)), 10**9, dtype=torch.int32)
    for b, n in enumerate(held):
        table[b, :n] = torch.tensor([free.pop() for _ in range(n)], dtype=torch.int32)
    starts = torch.tensor([0, *rows]).cumsum(0).int()
    return PagedBatch(table, starts, torch.tensor(lengths, dtype=torch.int32), n_decodes)


def without_hidden(batch: PagedBatch, size: int, window: int, chunk: int) -> PagedBatch:
    """No valid page in the tables where no query of the request attends to any of its keys."""
    tables = batch.page_tables.clone()
    first = batch.key_lengths - batch.query_starts.diff()
    low = (first - window + 1).clamp(min=0) if window else first * 0
    low = first // chunk * chunk if chunk else low
    for b, n in enumerate((low // size).tolist()):
        tables[b, :n] = 10**9
    return batch._replace(page_tables=tables)


def fill(pages_PS: Tensor, batch: PagedBatch) -> None:
    """Random values for the keys of all requests, NaN elsewhere."""
    size = pages_PS.shape[1]
    pages_PS.fill_(float("nan"))
    for b, length in enumerate(batch.key_lengths.tolist()):
        at = torch.arange(length)
        slots = batch.page_tables[b, at // size].long(), at % size
        pages_PS[slots] = torch.randn(length, *pages_PS.shape[2:]).to(pages_PS.dtype)


def make_cache(heads: Heads, batch: PagedBatch, size: int, dtype: torch.dtype) -> list[Tensor]:
    """Keys `[pages, G, C, size]` and values `[pages, G, size, V]`."""
    n_pages = int((-(-batch.key_lengths // size)).sum()) + 4
    keys = torch.empty(n_pages, heads.G, heads.C, size, dtype=dtype)
    values = torch.empty(n_pages, heads.G, size, heads.V, dtype=dtype)
    fill(keys.permute(0, 3, 1, 2), batch)
    fill(values.transpose(1, 2), batch)
    return [keys, values]


def make_queries(heads: Heads, batch: PagedBatch, dtype: torch.dtype) -> Tensor:
    """Parts of wider rows."""
    wide = torch.full((int(batch.query_starts[-1]), heads.H, heads.C + 5), float("nan"))
    wide[..., 3:-2] = torch.randn(*wide.shape[:2], heads.C)
    return wide.to(dtype)[..., 3:-2]


def assert_close(ours: Tensor, reference: Tensor) -> None:
    assert ours.shape == reference.shape and ours.dtype == reference.dtype
    if reference.numel() and bool(reference.any()):
        assert relative(ours, reference) < TOLERANCE[ours.dtype]
    else:
        assert torch.equal(ours, reference)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 5, 16])
@pytest.mark.parametrize("local", LOCAL)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("requests", KINDS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_heads(
    heads: Heads, requests: str, sinks: bool, local: str, size: int, dtype: torch.dtype
) -> None:
    batch = make_batch(*REQUESTS[requests], size)
    keys, values = make_cache(heads, batch, size, dtype)
    q = make_queries(heads, batch, dtype)
    batch = without_hidden(batch, size, *LOCAL[local])
    logits = 3 * torch.randn(heads.H).to(dtype) if sinks else None
    arguments = (q, keys, values, batch, 0.4, *LOCAL[local], logits)
    with kernels_on_cpu():
        ours = paged.paged_attention(*arguments)
    assert_close(ours, paged.paged_attention_reference(*arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 16])
@pytest.mark.parametrize("local", LOCAL)
@pytest.mark.parametrize("requests", KINDS)
@pytest.mark.parametrize("heads", LATENTS, ids=str)
def test_latents(heads: Heads, requests: str, local: str, size: int, dtype: torch.dtype) -> None:
    if heads.H == 70 and dtype == torch.float32:  # more than the rows of a tile: 64, in fp32 16
        heads = replace(heads, H=20)
    batch = make_batch(*REQUESTS[requests], size)
    n_pages = int((-(-batch.key_lengths // size)).sum()) + 4
    latents = torch.empty(n_pages, size, heads.C, dtype=dtype)
    fill(latents, batch)
    q = make_queries(heads, batch, dtype)
    batch = without_hidden(batch, size, *LOCAL[local])
    arguments = (q, latents, batch, 0.4, heads.V, *LOCAL[local])
    with kernels_on_cpu():
        ours = paged.paged_latent_attention(*arguments)
    assert_close(ours, paged.paged_latent_attention_reference(*arguments))


@pytest.mark.parametrize(
    ("latent", "dtype"),
    [
        (False, torch.float32), (True, torch.bfloat16),
        # `test_heads` and `test_latents` have every kind in both types
        pytest.param(False, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(True, torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)  # fmt: skip
def test_other_requests_do_not_matter(latent: bool, dtype: torch.dtype) -> None:
    """The bits of each request alone, in another place of the batch, with a wider page table."""
    heads, size = Heads(4, 1 if latent else 2, 20, 20 - 6 * latent), 5
    batch = make_batch([1, 1, 1, 9, 24], [200, 3, 130, 47, 25], 3, size)
    keys, values = make_cache(heads, batch, size, dtype)
    latents = values.new_empty(len(values), size, heads.C)
    fill(latents, batch)
    q = make_queries(heads, batch, dtype)

    def attend(q: Tensor, batch: PagedBatch) -> Tensor:
        with kernels_on_cpu():
            if latent:
                return paged.paged_latent_attention(q, latents, batch, 0.4, heads.V)
            return paged.paged_attention(q, keys, values, batch, 0.4)

    whole = attend(q, batch)
    for chosen in ([0], [3], [2, 1, 4], [2, 0, 4, 3]):
        rows = [slice(*batch.query_starts[b : b + 2].tolist()) for b in chosen]
        lengths = batch.key_lengths[chosen]
        width = -(-int(lengths.max()) // size)
        starts = torch.tensor([0, *[r.stop - r.start for r in rows]]).cumsum(0).int()
        n_decodes = sum(b < 3 for b in chosen)
        some = PagedBatch(batch.page_tables[chosen, :width], starts, lengths, n_decodes)
        ours = attend(torch.cat([q[r] for r in rows]), some)
        assert torch.equal(ours, torch.cat([whole[r] for r in rows])), chosen


def test_not_a_number_stays_in_its_request() -> None:
    heads = SMALL
    batch = make_batch([1, 1, 20], [150, 70, 30], 2, 16)
    keys, values = make_cache(heads, batch, 16, torch.float32)
    q = make_queries(heads, batch, torch.float32)
    keys[batch.page_tables[0, 2], 0] = float("nan")
    with kernels_on_cpu():
        ours = paged.paged_attention(q, keys, values, batch, 0.4)
    assert ours[0, :2].isnan().all() and not ours[0, 2:].isnan().any()
    assert not ours[1:].isnan().any()


def test_overwhelming_scores_and_sinks() -> None:
    """Neither logits nor sinks of several hundred overflow."""
    heads = SMALL
    batch = make_batch([1, 3], [130, 30], 1, 16)
    keys, values = make_cache(heads, batch, 16, torch.float32)
    q = make_queries(heads, batch, torch.float32)
    for scale, sink in ((200.0, 0.0), (1.0, 500.0), (200.0, -300.0)):
        arguments = (q, keys, values, batch, scale, 0, 0, torch.full((4,), sink))
        with kernels_on_cpu():
            ours = paged.paged_attention(*arguments)
        reference = paged.paged_attention_reference(*arguments)
        torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (3, 50), (2, 700)], ids=str)
def test_write(heads: tuple[int, int], dtype: torch.dtype) -> None:
    size, (G, C) = 5, heads
    rows = torch.randn(6, G, C + 3).to(dtype)[..., 1:-2]
    slots = torch.tensor([7, -1, 34, 5, -1, 12])
    memory = [torch.zeros(7, G, C, size, dtype=dtype), torch.zeros(7, G, size, C, dtype=dtype)]
    for pages in memory:
        view = pages.permute(0, 3, 1, 2) if pages.shape[3] == size else pages.transpose(1, 2)
        expected = view.clone()
        paged.write_pages_reference(rows, expected, slots)
        with kernels_on_cpu():
            paged.write_pages(rows, view, slots)
        assert torch.equal(view, expected) and bool(view.any())

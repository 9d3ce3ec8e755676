"""Attention of long sequences on a CPU, in pieces: the values and gradients of a dense mask, memory
linear in the length, and the bits of a document alone.

The oracle is torch's attention in fp64 over the whole batch with a mask built here.
"""

import random
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.layers.attention import document_attention_reference
from kernels.layers.attention_cpu import SHORT
from models.attention import Layer
from models.documents import DocumentAttention

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
"""Of the norm: fp32 sums of thousands of terms; bf16 rounds probabilities and outputs."""
LIMITS = {"full": (0, 0), "window": (70, 0), "long window": (600, 0), "chunk": (0, 96)}


def positions_of(lengths: list[list[int]]) -> Tensor:
    """`[B, L]` for the lengths of the documents of every sequence."""
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])


def mask_of(lengths: list[list[int]], window: int, chunk: int) -> Tensor:
    """Bool `[B, L, L]`, from the definition."""
    rows = []
    for row in lengths:
        place = [(d, p) for d, n in enumerate(row) for p in range(n)]
        document, position = torch.tensor(place).T
        seen = (document[:, None] == document) & (position[:, None] >= position)
        if window:
            seen &= position[:, None] - position < window
        if chunk:
            seen &= position[:, None] // chunk == position // chunk
        rows.append(seen)
    return torch.stack(rows)


def drawn(rng: random.Random, length: int, longest: int) -> list[int]:
    """Lengths of documents that fill a sequence; many are short."""
    left, lengths = length, []
    while left:
        lengths.append(
            min(left, rng.choice([1, 2, rng.randrange(1, 60), rng.randrange(1, longest)]))
        )
        left -= lengths[-1]
    return lengths


def results(core: Any, *leaves: Tensor) -> list[Tensor]:
    """The output and its gradients, for a fixed gradient of the output."""
    copies = [x.clone().requires_grad_() for x in leaves]
    out = core(*copies)
    torch.manual_seed(1)
    grad = torch.randn(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, copies, grad)]


def some() -> Iterator[Any]:
    """A quarter of all combinations, which have every two values together; the others are slow."""
    for (i, limit), (j, longest), (k, sinks), (n, dtype) in product(
        enumerate(LIMITS), enumerate((40, 1500)), enumerate((False, True)), enumerate(TOLERANCE)
    ):
        name = f"{limit}-{longest}-{'sinks-' if sinks else ''}{dtype}"
        marks = [] if (k, n) == (j ^ i % 2, j ^ i // 2) else [pytest.mark.slow]
        yield pytest.param(limit, longest, sinks, dtype, id=name, marks=marks)


@pytest.mark.parametrize(("limit", "longest", "sinks", "dtype"), [*some()])
def test_pieces_equal_a_dense_mask(
    limit: str, longest: int, sinks: bool, dtype: torch.dtype
) -> None:
    rng = random.Random(f"{limit} {longest} {sinks}")
    torch.manual_seed(0)
    length, H, G, C = rng.choice([737, 800, 1024]), 4, 2, 12  # several pieces
    lengths = [[length], drawn(rng, length, longest)]
    window, chunk = LIMITS[limit]
    positions, layer = positions_of(lengths), Layer(0, 0.3, window, chunk)
    T = positions.numel()
    leaves = [torch.randn(T, heads, C).to(dtype) for heads in (H, G, G)]
    leaves += [torch.randn(H).to(dtype)] if sinks else []

    def ours(q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor | None = None) -> Tensor:
        return DocumentAttention(positions)(layer, q, k, v, sinks_H)

    def exact(q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor | None = None) -> Tensor:
        parts = [x.view(2, length, -1, C).transpose(1, 2) for x in (q, k, v)]
        mask = mask_of(lengths, window, chunk)
        out = document_attention_reference(parts[0], parts[1], parts[2], mask, layer.scale, sinks_H)
        return out.transpose(1, 2).flatten(0, 1)

    found = results(ours, *leaves)
    expected = results(exact, *(x.double() for x in leaves))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        assert float((a.double() - b).norm() / b.norm()) < TOLERANCE[dtype]


class Largest(TorchDispatchMode):
    """Records the largest number of elements of a tensor."""

    n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [
            x.untyped_storage().nbytes() // x.itemsize
            for x in tree_leaves(out)
            if isinstance(x, Tensor)
        ]
        self.n = max(self.n, *sizes, 0)
        return out


@pytest.mark.parametrize("case", ["documents", "window", "chunk", "full", "sinks", "MLA"])
def test_no_tensor_grows_with_the_square_of_the_length(case: str) -> None:
    """At most the scores of a short piece, or of a block of queries of a long one."""
    layer = Layer(0, 0.3, 64 * (case == "window"), 64 * (case == "chunk"))
    length, H = 6144, 2  # the shortest with a square much larger than the limit
    lengths = [700] * (length // 700) + [length % 700] if case == "documents" else [length]
    shapes = (H, 8), (1, 8), (1, 5 if case == "MLA" else 8)
    q, k, v = (torch.randn(length, *shape, requires_grad=True) for shape in shapes)
    sinks = torch.randn(H, requires_grad=True) if case == "sinks" else None
    with Largest() as largest:
        core = DocumentAttention(positions_of([lengths]))
        core(layer, q, k, v, sinks).sum().backward()
    assert largest.n <= max(H * SHORT**2, 2**21) < length**2 / 16


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_later_documents_and_sequences_do_not_matter(dtype: torch.dtype, window: int) -> None:
    """Without gradients, as a server computes it: bit by bit, alone and in a batch."""
    torch.manual_seed(0)
    layer, first = Layer(0, 0.3, window), 651
    positions = positions_of([[first, 30, 119], [20, 780]])
    q, k, v = (torch.randn(1600, heads, 16).to(dtype) for heads in (4, 2, 2))
    whole = DocumentAttention(positions)(layer, q, k, v, None)[:first]
    alone = DocumentAttention(torch.arange(first)[None])(
        layer, q[:first], k[:first], v[:first], None
    )
    assert torch.equal(whole, alone)

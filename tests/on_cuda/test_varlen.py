"""Attention within documents as CUDA computes it, on a CPU: FlashAttention's operators of torch get
a CPU form of their contract here, and everything around them is the code that runs on CUDA.

The contract (torch's `_flash_attention_forward` with rows of several sequences, and its backward):
sequences begin at `cum_seq`, outputs and `logsumexp` are of the rows, backward computes
probabilities as exp(score - logsumexp) from the given logsumexp and the sum over each row of
gradient times output from the given output.
"""

import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.layers import attention_varlen
from kernels.layers.attention import document_attention_reference
from models import documents
from models.attention import Layer
from models.documents import DocumentAttention
from tests.models.test_documents import Largest, drawn, mask_of, positions_of, results

TOLERANCE = {torch.float64: 1e-12, torch.bfloat16: 2e-2}
HEADS = {"MHA": (3, 3, 16, 16), "GQA": (4, 2, 24, 24), "MLA": (2, 2, 20, 12), "odd": (6, 1, 5, 5)}
"""Query heads, key/value heads, width of keys, width of values."""
LIMITS = {"full": (0, 0), "window": (7, 0), "window of 1": (1, 0), "chunk": (0, 16)}


def scores(q: Tensor, k: Tensor, rows: slice, scale: float, left: int | None) -> Tensor:
    """Logits `[H, n, n]` of one sequence."""
    repeats = q.shape[1] // k.shape[1]
    keys = k[rows].double().repeat_interleave(repeats, 1)
    found = torch.einsum("qhc,khc->hqk", q[rows].double(), keys) * scale
    n = found.shape[1]
    ahead = torch.arange(n)[None, :] - torch.arange(n)[:, None]
    seen = ahead <= 0 if left is None else (ahead <= 0) & (ahead >= -left)
    return found.masked_fill(~seen, float("-inf"))


def forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, starts_k: Tensor, longest: int,
    longest_k: int, dropout: float, is_causal: bool, debug: bool, *, scale: float,
    window_size_left: int | None = None, window_size_right: int | None = None, **unset: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    check(q, k, v, starts, starts_k, longest, longest_k)
    assert is_causal and not dropout and not debug and window_size_right in (None, 0)
    out, lse = torch.empty_like(q), torch.empty(q.shape[1], len(q))
    lse = lse.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    for start, end in pairwise(starts.tolist()):
        rows = slice(start, end)
        logits = scores(q, k, rows, scale, window_size_left)
        values = v[rows].double().repeat_interleave(q.shape[1] // k.shape[1], 1)
        out[rows] = torch.einsum("hqk,khc->qhc", logits.softmax(-1), values).to(out.dtype)
        lse[:, rows] = logits.logsumexp(-1).to(lse.dtype)
    state = torch.zeros(2, dtype=torch.int64)
    return out, lse, state, torch.zeros(0), torch.zeros(0)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor,
    starts_k: Tensor, longest: int, longest_k: int, dropout: float, is_causal: bool,
    state: Tensor, unused: Tensor, *, scale: float, window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    check(q, k, v, starts, starts_k, longest, longest_k)
    assert grad.is_contiguous() and grad.shape == out.shape == q.shape
    H, G = q.shape[1], k.shape[1]
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    for start, end in pairwise(starts.tolist()):
        rows = slice(start, end)
        logits = scores(q, k, rows, scale, window_size_left)
        probs = (logits - lse[:, rows, None].double()).exp()
        given = grad[rows].double()
        values = v[rows].double().repeat_interleave(H // G, 1)
        keys = k[rows].double().repeat_interleave(H // G, 1)
        delta = (given * out[rows].double()).sum(-1).T[..., None]
        inner = probs * (torch.einsum("qhc,khc->hqk", given, values) - delta) * scale
        wide = (
            torch.einsum("hqk,khc->qhc", inner, keys),
            torch.einsum("hqk,qhc->khc", inner, q[rows].double()),
            torch.einsum("hqk,qhc->khc", probs, given),
        )
        for target, value in zip(grads, wide, strict=True):
            target[rows] = value.unflatten(1, (target.shape[1], -1)).sum(2).to(target.dtype)
    return tuple(grads)


def check(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, starts_k: Tensor, longest: int, longest_k: int
) -> None:
    """What the kernels require."""
    assert q.shape[2] == k.shape[2] == v.shape[2] and q.shape[2] % 8 == 0 and q.shape[2] <= 256
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert k.shape == v.shape and len(q) == len(k) and q.shape[1] % k.shape[1] == 0
    assert starts.dtype == torch.int32 and starts is starts_k and starts.is_contiguous()
    sizes = starts.diff()
    assert starts[0] == 0 and starts[-1] == len(q) and bool((sizes > 0).all())
    assert longest == longest_k == int(sizes.max())


@pytest.fixture(autouse=True)
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The operators for CPUs, and the choice of CUDA."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    monkeypatch.setattr(documents, "_computes_together", lambda *_: True)
    yield
    library._destroy()


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("heads", HEADS)
def test_it_equals_a_dense_mask(heads: str, limit: str, sinks: bool) -> None:
    """Outputs and gradients, in fp64 and in bf16; documents of one token, and sequences that end
    within a document."""
    rng = random.Random(f"{heads} {limit} {sinks}")
    torch.manual_seed(0)
    (H, G, C, V), length = HEADS[heads], rng.choice([33, 64, 70])
    lengths = [drawn(rng, length, 40), [length], drawn(rng, length, 9)]
    window, chunk = LIMITS[limit]
    positions, layer = positions_of(lengths), Layer(0, 0.3, window, chunk)
    wide = [torch.randn(3 * length, n, width) for n, width in ((H, C), (G, C), (G, V))]
    wide += [torch.randn(H)] if sinks else []

    def ours(q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor | None = None) -> Tensor:
        return DocumentAttention(positions)(layer, q, k, v, sinks_H)

    def exact(q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor | None = None) -> Tensor:
        q, k, v = (x.view(3, length, -1, x.shape[-1]).transpose(1, 2) for x in (q, k, v))
        mask = mask_of(lengths, window, chunk)
        out = document_attention_reference(q, k, v, mask, layer.scale, sinks_H)
        return out.transpose(1, 2).flatten(0, 1)

    for dtype, tolerance in TOLERANCE.items():
        leaves = [x.to(dtype) for x in wide]
        expected = results(exact, *(x.double() for x in leaves))
        for a, b in zip(results(ours, *leaves), expected, strict=True):
            assert a.dtype == dtype and a.shape == b.shape
            # a window of 1 leaves no gradient of queries and keys, and a sink's is a sum of
            # roundings of all tokens
            norm = max(float(b.norm()), len(b) ** 0.5)
            assert float((a.double() - b).norm()) < tolerance * norm


def test_no_tensor_grows_with_the_square_of_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Around the operators, which have no such tensor on a device."""
    length, H = 4096, 2
    q, k, v = (torch.randn(length, n, 8, requires_grad=True) for n in (H, 1, 1))
    sinks = torch.randn(H, requires_grad=True)
    calls: list[dict[str, Any]] = []

    class Operators:
        """Only shapes."""

        def _flash_attention_forward(self, q: Tensor, *_: Any, **options: Any) -> Any:
            calls.append(options)
            empty = torch.zeros(0)
            return torch.zeros_like(q), torch.zeros(H, len(q)), empty, empty, empty

        def _flash_attention_backward(self, _: Tensor, *given: Any, **options: Any) -> Any:
            calls.append(options)
            return tuple(torch.zeros_like(x) for x in given[:3])

    monkeypatch.setattr(attention_varlen, "_ATEN", Operators())
    with Largest() as largest:
        core = DocumentAttention(positions_of([[700] * 5 + [596]]))
        core(Layer(0, 0.3, 64), q, k, v, sinks).sum().backward()
    assert largest.n <= length * H * 8 and core.mask_bytes == 0
    options = {"scale": 0.3, "window_size_left": 63, "window_size_right": 0}
    assert calls == [options, options]


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_attention_is_always_this(
    monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    """Plain causal attention too, for which torch may choose a kernel with another gradient."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    called: list[str] = []
    compute = documents.varlen_attention

    def recorded(*given: Any) -> Tensor:
        called.append("varlen")
        return compute(*given)

    monkeypatch.setattr(documents, "varlen_attention", recorded)
    q = torch.randn(64, 2, 8)
    core = DocumentAttention(positions_of([[32], [32]]))
    plain = core(Layer(0, 0.3), q, q, q, None)
    assert called == ["varlen"] * deterministic
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: not deterministic)
    assert torch.allclose(plain, core(Layer(0, 0.3), q, q, q, None), atol=1e-6)


def test_recomputation_can_keep_the_result() -> None:
    from parallel.recompute import KEEP

    assert torch.ops.aten._flash_attention_forward.default in KEEP["attention"]


@pytest.mark.parametrize(
    ("dtype", "widths", "expected"),
    [
        (torch.bfloat16, (192, 128), True), (torch.float16, (256, 256), True),
        (torch.float32, (64, 64), False), (torch.bfloat16, (264, 128), False),
    ],
)  # fmt: skip
def test_what_the_kernels_support(
    dtype: torch.dtype, widths: tuple[int, int], expected: bool
) -> None:
    q = torch.empty(3, 2, widths[0], dtype=dtype, device="meta")
    assert attention_varlen.supports(q, widths[1]) == expected
    assert not attention_varlen.supports(torch.empty(3, 2, widths[0], dtype=dtype), widths[1])

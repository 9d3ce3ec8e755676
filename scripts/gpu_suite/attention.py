"""Attention within documents: against the reference, then against a dense mask and one launch per
document, at 4,096 and 32,768 tokens."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.layers.attention import document_attention_reference
from models.attention import Layer
from models.documents import DocumentAttention
from scripts.gpu_suite.harness import Check, Place, Timing
from scripts.gpu_suite.harness import measure as take_time

HEADS = {
    "Qwen3": (32, 4, 128, 128),
    "DeepSeek-V3": (32, 32, 192, 128),
    "GPT-OSS": (64, 8, 64, 64),
}
"""Query heads, key/value heads, width of keys, width of values; DeepSeek-V3's of one of four ranks
of tensor parallelism."""
LIMITS = {"": (0, 0), ", window 128": (128, 0), ", chunks of 100": (0, 100)}
LENGTHS = [[300, 1, 211], [512], [37, 475]]
"""Documents of each sequence of the checks."""
SHORT_LENGTHS = [[150, 1, 49], [200], [37, 163]]
"""The same for a dry run."""
TIMED = [(8, 4096, 700), (1, 32768, 700), (1, 32768, 32768)]
"""Sequences, their length, and that of documents."""
LARGEST_MASK = 2**30


def check(place: Place) -> Iterator[Check]:
    """Outputs and gradients in bf16 against fp64 of the same values on the CPU."""
    torch.manual_seed(0)
    for name, (H, G, C, V) in HEADS.items():
        if place.dry_run:
            H, G, C, V = 2, 1 if H != G else 2, C // 8, V // 8
        for limit, (window, chunk) in LIMITS.items():
            for dtype in [torch.float32] if place.dry_run else [torch.bfloat16, torch.float32]:
                yield from _check(f"{name}{limit}", (H, G, C, V), window, chunk, dtype, place)


def _check(
    case: str, heads: tuple[int, ...], window: int, chunk: int, dtype: torch.dtype, place: Place
) -> Iterator[Check]:
    H, G, C, V = heads
    lengths = SHORT_LENGTHS if place.dry_run else LENGTHS
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    layer, T = Layer(0, C**-0.5, window, chunk), positions.numel()
    leaves = [torch.randn(T, n, width).to(dtype) for n, width in ((H, C), (G, C), (G, V))]
    leaves += [torch.randn(H)] if case.startswith("GPT-OSS") else []
    grad = torch.randn(T, H, V).to(dtype)

    def exact(q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor | None = None) -> Tensor:
        parts = [x.unflatten(0, positions.shape).transpose(1, 2) for x in (q, k, v)]
        mask = DocumentAttention(positions).mask(Layer(0, 1.0, window, chunk))
        return (
            document_attention_reference(parts[0], parts[1], parts[2], mask, layer.scale, sinks_H)
            .transpose(1, 2)
            .flatten(0, 1)
        )

    def ours(q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor | None = None) -> Tensor:
        core = DocumentAttention(positions.clone()).to(place.device)
        return core(layer, q, k, v, sinks_H)

    expected = _results(exact, [x.double() for x in leaves], grad.double())
    found = _results(ours, [x.to(place.device) for x in leaves], grad.to(place.device))
    for part, a, b in zip(("o", "dq", "dk", "dv", "dsinks"), found, expected, strict=False):
        error = float((a.cpu().double() - b).norm() / b.norm())
        limit = 1e-2 if dtype == torch.bfloat16 else 2e-3  # fp32 products may be in tf32
        yield Check(f"{case}, {str(dtype)[6:]}, {part}", error, limit)


def measure(place: Place) -> Iterator[Timing]:
    """Forward and backward of packed documents, and of one document per sequence."""
    for B, length, document in [(2, 64, 20)] if place.dry_run else TIMED:
        for name, heads in HEADS.items():
            yield _measure(name, heads, (B, length, document), place)


def _measure(
    name: str, heads: tuple[int, ...], shape: tuple[int, int, int], place: Place
) -> Timing:
    (H, G, C, V), (B, length, document) = heads, shape
    positions = torch.arange(length).expand(B, length) % document
    sizes = ((H, C), (G, C), (G, V))
    leaves = [
        torch.randn(B * length, n, width, device=place.device).bfloat16().requires_grad_()
        for n, width in sizes
    ]
    sinks = [torch.zeros(H, device=place.device, requires_grad=True)] * (name == "GPT-OSS")
    grad = torch.randn(B * length, H, V, device=place.device).bfloat16()
    layer, core = Layer(0, C**-0.5), DocumentAttention(positions.clone()).to(place.device)

    def dense(q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor | None = None) -> Tensor:
        if B * length**2 > LARGEST_MASK:
            raise RuntimeError("its mask is too large")
        parts = [x.unflatten(0, (B, length)).transpose(1, 2) for x in (q, k, v)]
        mask = core.mask(layer)
        out = document_attention_reference(parts[0], parts[1], parts[2], mask, layer.scale, sinks_H)
        return out.transpose(1, 2).flatten(0, 1)

    def alone(q: Tensor, k: Tensor, v: Tensor, _: None = None) -> Tensor:
        rows = [n for _ in range(B) for n in _lengths(length, document)]
        out = [
            document_attention_reference(
                q.transpose(0, 1)[None],
                k.transpose(0, 1)[None],
                v.transpose(0, 1)[None],
                None,
                layer.scale,
            )
            for q, k, v in zip(*(x.split(rows) for x in (q, k, v)), strict=True)
        ]
        return torch.cat([each[0].transpose(0, 1) for each in out])

    def run(attend: Callable[..., Tensor]) -> list[Tensor]:
        return _results(attend, [*leaves, *sinks], grad)

    forms: dict[str, Callable[..., Tensor]] = {
        "ours": partial(core, layer), "SDPA, dense mask": dense
    }  # fmt: skip
    if not sinks:
        forms["SDPA, a launch per document"] = alone
    pairs = B * sum(n * (n + 1) / 2 for n in _lengths(length, document))
    return take_time(
        f"{name}, {B} x {length}, documents of {document}",
        {key: partial(run, form) for key, form in forms.items()},
        place,
        flops=3.5 * 2 * H * (C + V) * pairs,  # backward computes the scores again
    )


def _lengths(length: int, document: int) -> list[int]:
    whole, rest = divmod(length, document)
    return [document] * whole + [rest] * (rest > 0)


def _results(attend: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    given = [x.detach().requires_grad_() for x in leaves]
    out = attend(*given, *[None] * (4 - len(given)))  # sinks or None
    return [out.detach(), *torch.autograd.grad(out, given, grad)]

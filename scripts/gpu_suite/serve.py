"""Serving: attention over pages, and decode steps with and without CUDA graphs.

Checks: every family's heads against the plain-torch reference on the same device; a request's bits
alone and among others; logits of small models on the device, with graphs and without, against the
engine's CPU form, whose bits are those of training. Times: the attention of decodes against a copy
of as many bytes as it reads, then tokens per second of whole decode steps.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from configs.model import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from kernels.paged_attention.batch import PagedBatch
from kernels.paged_attention.paged_attention import (
    paged_attention,
    paged_attention_reference,
    paged_latent_attention,
    paged_latent_attention_reference,
    write_pages,
    write_pages_reference,
)
from models.decoder import Decoder
from models.router import routers
from scripts.gpu_suite.harness import Check, Place, Timing
from scripts.gpu_suite.harness import measure as take_time
from serve.cache.kv_cache import KvCache
from serve.cuda.runner import CudaRunner
from serve.engine.batch import ForwardBatch, lay_out
from serve.engine.runner import ModelRunner

HEADS = {
    "Qwen3-30B-A3B": (32, 4, 128, 0, 0, False),
    "GLM-4.5": (96, 8, 128, 0, 0, False),
    "Mixtral-8x7B": (32, 8, 128, 0, 0, False),
    "GPT-OSS, window": (64, 8, 64, 128, 0, True),
    "GPT-OSS, full": (64, 8, 64, 0, 0, True),
    "Llama 4, chunk": (40, 8, 128, 0, 8192, False),
}
"""Query heads, key/value heads, width, window, chunk, sinks."""
LATENTS = {"DeepSeek-V3": (128, 512, 64), "DeepSeek-V2-Lite": (16, 512, 64)}
"""Query heads, width of the latent, width of the rotated part."""
REQUESTS = [(1, 1), (1, 700), (1, 9000), (1, 8193), (1, 20000), (300, 300), (65, 9001), (1, 5)]
"""Rows and keys of each request; the first five are decodes. The last is a chunk of one token."""
N_DECODES = 5
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
PAGE_SIZES = (16, 64, 5)
DECODES = [(1, 32768), (64, 8192), (256, 2048)]
"""Requests and keys of each, to be timed."""
STEPS = (1, 16, 64)
"""Requests of the timed steps."""
LAYERS, CONTEXT = 12, 4096


@dataclass(frozen=True)
class DecodeTiming(Timing):
    """A decode step."""

    tokens: int = 0

    def rate(self, name: str) -> str:
        """Tokens per second."""
        return f"{self.tokens / self.milliseconds[name] * 1e3:,.0f} tokens/s"


def check(place: Place) -> Iterator[Check]:
    """Check kernels first, then models."""
    torch.manual_seed(0)
    for dtype in LIMIT:
        for i, name in enumerate(HEADS):
            yield from _check_heads(name, PAGE_SIZES[i % 3], dtype, place)
        for i, name in enumerate(LATENTS):
            yield from _check_latents(name, PAGE_SIZES[i % 3], dtype, place)
    yield _check_writing(place)
    for name, config in _small_models().items():
        yield from _check_model(name, config, place)


def measure(place: Place) -> Iterator[Timing]:
    """Time the attention of decodes, then decode steps of Qwen3-30B-A3B's layers."""
    for B, length in [(2, 64)] if place.dry_run else DECODES:
        H, G, C, *_ = HEADS["Qwen3-30B-A3B"]
        batch, n_pages = _batch(place, [(1, length)] * B, B, 16)
        q = _random(place, torch.bfloat16, B, H, C)
        keys = _random(place, torch.bfloat16, n_pages, G, C, 16)
        values = _random(place, torch.bfloat16, n_pages, G, 16, C)
        moved = 2 * B * length * G * C * 2
        run = partial(paged_attention, q, keys, values, batch, C**-0.5)
        yield _time(f"decode, {B} x {length} keys of Qwen3-30B-A3B", run, moved, place)
        H, rank, rotated = LATENTS["DeepSeek-V3"]
        q = _random(place, torch.bfloat16, B, H, rank + rotated)
        latents = _random(place, torch.bfloat16, n_pages, 16, rank + rotated)
        moved = B * length * (rank + rotated) * 2
        run = partial(paged_latent_attention, q, latents, batch, 0.07, rank)
        yield _time(f"decode, {B} x {length} latents of DeepSeek-V3", run, moved, place)
    yield from _time_steps(place)


def _time(case: str, run: Callable[[], Tensor], moved: int, place: Place) -> Timing:
    half = torch.empty(moved // 2, dtype=torch.int8, device=place.device)
    copy = partial(torch.empty_like(half).copy_, half)
    return take_time(case, {"ours": run, "copy": copy}, place, bytes=moved)


def _time_steps(place: Place) -> Iterator[Timing]:
    layers, context = (1, 40) if place.dry_run else (LAYERS, CONTEXT)
    steps = (1, 3) if place.dry_run else STEPS
    config = _qwen3(layers, place.dry_run)
    model = _model(config, torch.bfloat16, place.device)
    per_request = context // 16 + 1
    cache = KvCache(config, per_request * max(steps) + 1, 16, torch.bfloat16, place.device)
    graphs = CudaRunner(model, cache, max(steps), per_request)
    plain = CudaRunner(model, cache)
    for B in steps:
        pages = [list(range(1 + b * per_request, 1 + (b + 1) * per_request)) for b in range(B)]
        chunks = [([b + 1], context - 1, pages[b]) for b in range(B)]
        batch = lay_out(chunks, 16, range(B))
        forms: dict[str, Callable[[], object]] = {
            "ours": partial(graphs.run, batch),
            "without graphs": partial(plain.run, batch),
        }
        timed = take_time("", forms, place)
        case = f"decode step, {layers} layers of Qwen3-30B-A3B, {B} x {context} tokens"
        yield DecodeTiming(case, timed.milliseconds, tokens=B)


def _requests(place: Place, size: int) -> tuple[PagedBatch, int]:
    """`REQUESTS`, or in a dry run short ones; and the number of pages of the cache."""
    rows = [(min(n, 9), min(end, 40)) for n, end in REQUESTS] if place.dry_run else REQUESTS
    return _batch(place, rows, N_DECODES, size)


def _batch(
    place: Place, requests: list[tuple[int, int]], n_decodes: int, size: int
) -> tuple[PagedBatch, int]:
    held = [-(-end // size) for _, end in requests]
    order = torch.randperm(sum(held)) + 1
    tables = torch.zeros(len(requests), max(held), dtype=torch.int32)
    for table, pages in zip(tables, order.split(held), strict=True):
        table[: len(pages)] = pages
    starts = torch.tensor([0, *[n for n, _ in requests]]).cumsum(0).int()
    lengths = torch.tensor([end for _, end in requests], dtype=torch.int32)
    tables, starts, lengths = (each.to(place.device) for each in (tables, starts, lengths))
    return PagedBatch(tables, starts, lengths, n_decodes), sum(held) + 1


def _random(place: Place, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=place.device).to(dtype)


def _check_heads(name: str, size: int, dtype: torch.dtype, place: Place) -> Iterator[Check]:
    H, G, C, window, chunk, sinks = HEADS[name]
    batch, n_pages = _requests(place, size)
    q = _random(place, dtype, int(batch.query_starts[-1]), H, C)
    keys = _random(place, dtype, n_pages, G, C, size)
    values = _random(place, dtype, n_pages, G, size, C)
    options = (C**-0.5, window, chunk, _random(place, dtype, H) if sinks else None)

    def attend(q: Tensor, batch: PagedBatch) -> Tensor:
        return paged_attention(q, keys, values, batch, *options)

    exact = paged_attention_reference(q, keys, values, batch, *options)
    yield from _compare(f"paged_attention {name}, {size} per page", attend, q, batch, exact)


def _check_latents(name: str, size: int, dtype: torch.dtype, place: Place) -> Iterator[Check]:
    H, rank, rotated = LATENTS[name]
    batch, n_pages = _requests(place, size)
    q = _random(place, dtype, int(batch.query_starts[-1]), H, rank + rotated)
    latents = _random(place, dtype, n_pages, size, rank + rotated)

    def attend(q: Tensor, batch: PagedBatch) -> Tensor:
        return paged_latent_attention(q, latents, batch, 0.07, rank)

    exact = paged_latent_attention_reference(q, latents, batch, 0.07, rank)
    yield from _compare(f"paged_latent_attention {name}, {size} per page", attend, q, batch, exact)


def _compare(
    case: str, attend: Callable[[Tensor, PagedBatch], Tensor], q: Tensor, batch: PagedBatch,
    exact: Tensor,
) -> Iterator[Check]:  # fmt: skip
    """The difference to the reference, and the number of requests with other bits alone."""
    whole, differing = attend(q, batch), 0
    case = f"{case}, {str(q.dtype)[6:]}"
    yield Check(case, _relative(whole, exact), LIMIT[q.dtype])
    for b, (start, stop) in enumerate(pairwise(batch.query_starts.tolist())):
        one = PagedBatch(
            batch.page_tables[b : b + 1], batch.query_starts[b : b + 2] - start,
            batch.key_lengths[b : b + 1], int(b < batch.n_decodes),
        )  # fmt: skip
        differing += not torch.equal(attend(q[start:stop], one), whole[start:stop])
    yield Check(f"{case}, requests that differ alone", float(differing), 0.0)


def _check_writing(place: Place) -> Check:
    rows = _random(place, torch.bfloat16, 100, 4, 80)
    slots = torch.randperm(20 * 5)[:100].to(place.device) - 10
    pages = [torch.zeros(20, 4, 80, 5, device=place.device).bfloat16() for _ in range(2)]
    write_pages(rows, pages[0].permute(0, 3, 1, 2), slots)
    write_pages_reference(rows, pages[1].permute(0, 3, 1, 2), slots)
    return Check("write_pages, differs", float(not torch.equal(*pages)), 0.0)


def _check_model(name: str, config: ModelConfig, place: Place) -> Iterator[Check]:
    """A prompt in two chunks, then decodes of three requests in a graph of four."""
    models = [_model(config, torch.float32, device) for device in (place.device, "cpu")]
    models[0].load_state_dict(models[1].state_dict())
    caches = [KvCache(config, 40, 16, torch.float32, torch.device(device))
              for device in (place.device, place.device, "cpu")]  # fmt: skip
    runners = {
        "with graphs": CudaRunner(models[0], caches[0], 4, 8),
        "without graphs": CudaRunner(models[0], caches[1]),
    }
    exact = ModelRunner(models[1], caches[2], fuses=False)
    worst = dict.fromkeys(runners, 0.0)
    for batch in _steps(2 if place.dry_run else 8):
        expected = exact.run(batch)
        for kind, runner in runners.items():
            worst[kind] = max(worst[kind], _relative(runner.run(batch), expected))
    for kind, figure in worst.items():
        yield Check(f"logits of {name} {kind}, device and CPU", figure, 1e-4)


def _steps(n_decodes: int) -> Iterator[ForwardBatch]:
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 90, (3, 100), generator=draw).tolist()
    pages = [list(range(1 + 7 * b, 8 + 7 * b)) for b in range(3)]
    for ends in ((40, 1, 7), (80, 2, 50), *((81 + i, 3 + i, 51 + i) for i in range(n_decodes))):
        starts = {40: (0, 0, 0), 80: (40, 1, 7)}.get(ends[0], tuple(end - 1 for end in ends))
        chunks = [(tokens[b][starts[b] : ends[b]], starts[b], pages[b]) for b in range(3)]
        chunks.sort(key=lambda chunk: len(chunk[0]) > 1)
        yield lay_out(chunks, 16, range(sum(len(chunk[0]) for chunk in chunks)))


def _small_models() -> dict[str, ModelConfig]:
    moe = MoEConfig(n_experts=8, top_k=2, d_expert=32)
    heads = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 16}
    attention = {
        "Qwen3": AttentionConfig(**heads, qk_norm="rms"),  # type: ignore[arg-type]
        "GPT-OSS": AttentionConfig(
            **heads, sinks=True, bias=True, local="window", local_size=7, full_every=2,  # type: ignore[arg-type]
        ),
        "DeepSeek-V3": AttentionConfig(
            kind="mla", n_heads=4, q_lora_rank=20, kv_lora_rank=24, qk_nope_head_dim=16,
            qk_rope_head_dim=8, v_head_dim=12,
        ),
    }  # fmt: skip
    return {
        name: ModelConfig(
            vocab_size=96, d_model=64, n_layers=2, attention=each, moe=moe,
            rope=RopeConfig(interleaved=name == "DeepSeek-V3"),
        )
        for name, each in attention.items()
    }  # fmt: skip


def _qwen3(n_layers: int, small: bool) -> ModelConfig:
    if small:
        return replace(_small_models()["Qwen3"], n_layers=n_layers)
    return ModelConfig(
        vocab_size=151936, d_model=2048, n_layers=n_layers,
        attention=AttentionConfig(n_heads=32, n_kv_heads=4, head_dim=128, qk_norm="rms"),
        moe=MoEConfig(n_experts=128, top_k=8, d_expert=768),
    )  # fmt: skip


@torch.no_grad()
def _model(config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> Decoder:
    """Random weights with which every part affects the result."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Decoder(config)
    model = model.to(dtype).eval()
    for name, parameter in model.named_parameters():
        if not name.endswith("norm.weight"):
            parameter.normal_(0, 0.3 if config.d_model < 1000 else 0.02)
    for router in routers(model):
        router.float_bias()
    return model


def _relative(ours: Tensor, reference: Tensor) -> float:
    ours, reference = ours.cpu().double(), reference.cpu().double()
    return float((ours - reference).norm() / reference.norm().clamp(min=1e-30))

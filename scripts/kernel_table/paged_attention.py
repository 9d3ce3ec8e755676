"""Attention over pages, at the shapes of models, and writing to pages."""

from functools import partial

import torch

from kernels.paged_attention import paged_attention_triton
from kernels.paged_attention.batch import PagedBatch
from scripts.kernel_table.case import Case

REQUESTS, PAGES, PAGE_SIZE, CHUNK = 64, 2048, 16, 512
HEADS = {
    "32 heads of 128": (32, 4, 128, 0, False),  # Qwen3-30B-A3B
    "64 heads of 64, window and sinks": (64, 8, 64, 128, True),  # GPT-OSS-120B
    "16 heads of 256": (16, 8, 256, 0, False),
}
"""Query heads, key/value heads, width, window, sinks."""
LATENT_HEADS, RANK, ROTATED = 128, 512, 64
"""DeepSeek-V3."""


def cases() -> list[Case]:
    """Decodes, which multiply few rows, and chunks of prompts; bf16 and fp32."""
    found = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        is_bf16 = dtype == torch.bfloat16
        for step, decodes in (("decode", True), ("chunk", False)):
            for heads, shape in HEADS.items():
                launch = partial(_attend, *shape, decodes, dtype)
                cores = "bf16, few rows" if decodes else "bf16"
                found.append(
                    Case(
                        f"paged_attention {step}, {heads}, {name}", launch, is_bf16,
                        everyday=is_bf16 or heads.startswith("32"), cores=cores, index=0,
                        descriptors=False,
                    )
                )  # fmt: skip
            launch = partial(_attend_latents, decodes, dtype)
            found.append(
                Case(
                    f"paged_latent_attention {step}, {name}", launch, is_bf16,
                    everyday=is_bf16, cores="bf16, few rows", index=0, descriptors=False,
                )
            )  # fmt: skip
    return [
        *found,
        Case("paged_attention, sum of splits", _combine),
        Case("write_pages", _write),
    ]


def _requests(decodes: bool) -> PagedBatch:
    n = REQUESTS if decodes else 4
    tables = torch.zeros(n, PAGES, dtype=torch.int32)
    integers = torch.zeros(n + 1, dtype=torch.int32)
    return PagedBatch(tables, integers, integers[1:], n if decodes else 0)


def _attend(
    H: int, G: int, C: int, window: int, sinks: bool, decodes: bool, dtype: torch.dtype,
    fp8: torch.dtype,
) -> None:  # fmt: skip
    q = torch.empty(REQUESTS if decodes else CHUNK, H, C, dtype=dtype)
    keys = torch.empty(4, G, C, PAGE_SIZE, dtype=dtype)
    values = torch.empty(4, G, PAGE_SIZE, C, dtype=dtype)
    logits = torch.empty(H) if sinks else None
    paged_attention_triton.attend(
        q, keys, values, _requests(decodes), 0.1, window, 0, logits, shared=False
    )


def _attend_latents(decodes: bool, dtype: torch.dtype, fp8: torch.dtype) -> None:
    q = torch.empty(REQUESTS if decodes else CHUNK, LATENT_HEADS, RANK + ROTATED, dtype=dtype)
    latents = torch.empty(4, 1, PAGE_SIZE, RANK + ROTATED, dtype=dtype)
    keys, values = latents.transpose(2, 3), latents[..., :RANK]
    paged_attention_triton.attend(q, keys, values, _requests(decodes), 0.1, 0, 0, None, shared=True)


def _combine(fp8: torch.dtype) -> None:
    """Launched after the attention of decodes with several splits."""
    _attend(32, 4, 128, 0, False, True, torch.bfloat16, fp8)


def _write(fp8: torch.dtype) -> None:
    rows = torch.empty(CHUNK, 4, 128, dtype=torch.bfloat16)
    pages = torch.empty(4, 4, 128, PAGE_SIZE, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    paged_attention_triton.write(rows, pages, torch.zeros(CHUNK, dtype=torch.int64))

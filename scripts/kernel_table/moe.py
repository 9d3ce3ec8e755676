"""Permutation of rows, and the router."""

import torch
from torch import Tensor

from kernels.moe import permute_triton, router_triton
from kernels.moe.router import RouterOptions
from scripts.kernel_table.case import SIZE, Case

TOKENS, TOP_K = 4096, 8


def cases() -> list[Case]:
    """Few and many experts; rows wide and narrow; routers of three families."""
    return [*_permutations(), *_rows(), *_routers()]


def _permutations() -> list[Case]:
    ids = torch.zeros(TOKENS * TOP_K, dtype=torch.int64)
    found = []
    for experts in (8, 256):

        def first(fp8: torch.dtype, experts: int = experts) -> object:
            return permute_triton.ranks(ids, experts)

        found.append(Case(f"permutation 1st, {experts} experts", first))
        histograms = torch.empty(32, experts, dtype=torch.int32)
        for align in (1, 128):

            def second(
                fp8: torch.dtype, align: int = align, histograms: Tensor = histograms
            ) -> object:
                slots = len(ids) + histograms.shape[1] * (align - 1)
                return permute_triton.places(
                    ids, ids, histograms, histograms.shape[1], align, slots
                )

            found.append(Case(f"permutation 2nd, {experts} experts, align {align}", second))
    return found


def _rows() -> list[Case]:
    order = inverse = torch.zeros(TOKENS * TOP_K, dtype=torch.int64)
    wide = torch.empty(TOKENS, SIZE, dtype=torch.bfloat16)
    found = []
    for name, x in (("bf16", wide), ("fp32 column", torch.empty(TOKENS, 1))):

        def gather(fp8: torch.dtype, x: Tensor = x) -> object:
            return permute_triton.gather(x, order, inverse, TOP_K)

        def combine(fp8: torch.dtype, x: Tensor = x) -> object:
            rows = x.new_empty(TOKENS * TOP_K, x.shape[1])
            return permute_triton.combine(rows, inverse, TOP_K)

        found += [Case(f"gather_rows {name}", gather), Case(f"combine_rows {name}", combine)]
    return found


def _routers() -> list[Case]:
    families = {
        "softmax, 8 experts": (8, RouterOptions(2, True)),
        "softmax, 128 experts": (128, RouterOptions(8, True)),
        "sigmoid, 256 experts in 8 groups": (256, RouterOptions(8, False, 8, 4, True, 2.5)),
    }
    found = []
    for name, (experts, rule) in families.items():
        logits, bias = torch.empty(TOKENS, experts), torch.empty(experts)
        ids = torch.zeros(TOKENS, rule.top_k, dtype=torch.int64)

        def forward(
            fp8: torch.dtype,
            logits: Tensor = logits,
            bias: Tensor = bias,
            rule: RouterOptions = rule,
        ) -> object:
            return router_triton.route(logits, bias, None, *rule)

        def given(
            fp8: torch.dtype, logits: Tensor = logits, bias: Tensor = bias, ids: Tensor = ids,
            rule: RouterOptions = rule,
        ) -> object:  # fmt: skip
            return router_triton.route(logits, bias, ids, *rule)

        def backward(
            fp8: torch.dtype, logits: Tensor = logits, ids: Tensor = ids, rule: RouterOptions = rule
        ) -> object:
            grad = logits.new_empty(ids.shape)
            return router_triton.backward(grad, logits, ids, rule.softmax, True, rule.scale)

        found += [
            Case(f"router, {name}", forward),
            Case(f"router, given ids, {name}", given, everyday=False),
            Case(f"router backward, {name}", backward),
        ]
    return found

"""Permute rows of tokens to rows grouped by expert, and back.

A token with K experts becomes K rows; rows of one expert are contiguous, in token order (a
stable order, so the result is deterministic). Both directions are parallel over tokens: for the
experts, a token is read once and written to its K slots; back, its K slots are read and summed in
the order of its choices. So neither needs atomics, no row is read twice, and each is the gradient
of the other.

Groups may start at a multiple of `align`. A slot without a row is -1 in `order_P`, and the kernel
that fills the slots writes zeros there: there is no separate clearing and no list of such slots,
whose length a host would have to wait for. For the same reason the number of slots is an upper
bound on an accelerator; slots from the last end on belong to no expert. A CPU, which need not wait,
has exactly as many as the groups occupy.

A choice may be no expert (id E): it has no slot, and its result is zero. This allows tokens with
different numbers of rows, and partly filled buffers of fixed size.

Routing weights are permuted the same way, as rows of width one: they are applied between the two
products of an expert (`kernels.mlp.swiglu`), which is free there, and combining is a plain sum.

The gather is not fused into the loads of the grouped product
(`kernels.grouped_gemm.grouped_gemm_triton`): TMA reads neighboring rows, and the weight gradient
needs the row-grouped copy anyway. In FP8 rows are not quantized during the permutation either: the
gradient of the weights needs them per 128 rows, from unrounded values.

Shapes: T tokens, K experts per token, R = T * K rows, P slots, D width, E experts.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import device


class Permutation(NamedTuple):
    """Positions of the R routed rows in P slots."""

    order_P: Tensor
    """Flat index t * K + k of the row in every slot, int64; -1 where there is none."""
    inverse_R: Tensor
    """Slot of every flat index, int64; -1 where it has none."""
    ends_E: Tensor
    """End of every expert's slots, int64; slots from the last end on belong to no expert."""
    counts_E: Tensor
    """True rows of every expert, int64."""


def count_choices(ids_TK: Tensor, n_experts: int) -> Tensor:
    """Number of choices of each expert, int64 `[E]`. (`bincount` would wait for a CUDA device.)"""
    flat_R = ids_TK.reshape(-1)
    return flat_R.new_zeros(n_experts).scatter_add_(0, flat_R, torch.ones_like(flat_R))


def permutation(
    ids_TK: Tensor, n_experts: int, align: int = 1, n_rows: int | None = None
) -> Permutation:
    """Group routed rows by expert, stably.

    ids_TK: expert of every (token, choice), int64, any shape; `n_experts` means no expert. n_rows:
    number of choices of an expert, if the host knows it: the others then have no slots.
    """
    ids_R = ids_TK.reshape(-1)
    n_rows = len(ids_R) if n_rows is None else n_rows
    n_slots: int | None = n_rows
    if align > 1:
        # whole groups of `align`, at most one of them incomplete for each chosen expert
        bound = (n_rows + min(n_experts, n_rows) * (align - 1)) // align * align
        exact = ids_R.device.type == "cpu" and not device.on_accelerator(ids_R)
        n_slots = None if exact else bound
    return Permutation(*_permutation(ids_R, n_experts, align, n_slots))


def gather_rows(x_TD: Tensor, to: Permutation) -> Tensor:
    """`rows_PD` with `rows[p] = x[order[p] // K]`, zero in empty slots; K = R / T.

    Differentiable in `x_TD`.
    """
    rows_PD: Tensor = _gather_rows(x_TD, to.order_P, to.inverse_R, _top_k(x_TD, to))
    return rows_PD


def combine_rows(rows_PD: Tensor, back: Permutation, top_k: int) -> Tensor:
    """`y_TD` with `y[t] = sum_k rows[inverse[t * K + k]]`, rounded once; rows without a slot count
    as zero. Differentiable in rows."""
    y_TD: Tensor = _combine_rows(rows_PD, back.order_P, back.inverse_R, top_k)
    return y_TD


def permutation_reference(
    ids_TK: Tensor, n_experts: int, align: int = 1, n_rows: int | None = None
) -> Permutation:
    """Plain loops; exactly as many slots as the groups take, or with `align` 1 one per row."""
    ids = ids_TK.reshape(-1).tolist()
    order: list[int] = []
    ends, counts, inverse = [], [], [-1] * len(ids)
    for expert in range(n_experts):
        rows = [row for row, named in enumerate(ids) if named == expert]
        for row in rows:
            inverse[row] = len(order)
            order.append(row)
        order += [-1] * (-len(order) % align)
        ends.append(len(order))
        counts.append(len(rows))
    if align == 1:
        order += [-1] * ((len(ids) if n_rows is None else n_rows) - len(order))
    made = [torch.tensor(values, dtype=torch.int64) for values in (order, inverse, ends, counts)]
    return Permutation(*made)


def gather_rows_reference(x_TD: Tensor, to: Permutation) -> Tensor:
    """Plain-torch form of `gather_rows`."""
    source_P = torch.where(to.order_P < 0, len(x_TD), to.order_P // _top_k(x_TD, to))
    return torch.cat([x_TD, x_TD.new_zeros(1, x_TD.shape[1])])[source_P]


def combine_rows_reference(rows_PD: Tensor, back: Permutation, top_k: int) -> Tensor:
    """Plain-torch form of `combine_rows`."""
    padded = torch.cat([rows_PD, rows_PD.new_zeros(1, rows_PD.shape[1])]).float()
    rows_RD = padded[torch.where(back.inverse_R < 0, len(rows_PD), back.inverse_R)]
    return rows_RD.unflatten(0, (-1, top_k)).sum(1).to(rows_PD.dtype)


def _top_k(x_TD: Tensor, to: Permutation) -> int:
    return len(to.inverse_R) // len(x_TD) if len(x_TD) else 1


@torch.library.custom_op("phalanx::permutation", mutates_args=())
def _permutation(
    ids_R: Tensor, n_experts: int, align: int, n_slots: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """n_slots: None for exactly as many as the groups occupy."""
    if device.on_accelerator(ids_R):
        from kernels.moe.permute_triton import permutation as launch

        assert n_slots is not None
        with device.launching_on(ids_R):
            return launch(ids_R, n_experts, align, n_slots)
    sorted_R = torch.argsort(ids_R, stable=True)  # choices of no expert are the last
    counts_E = count_choices(ids_R, n_experts + 1)[:-1].clone()
    n_named = int(counts_E.sum())
    padded_E = (counts_E + align - 1) // align * align
    ends_E = padded_E.cumsum(0)
    slot_R = torch.arange(len(ids_R))
    if align > 1:
        shift_E = (ends_E - padded_E) - (counts_E.cumsum(0) - counts_E)
        slot_R[:n_named] += shift_E.repeat_interleave(counts_E)
    slot_R[n_named:] = -1
    inverse_R = torch.empty_like(ids_R).scatter_(0, sorted_R, slot_R)
    sorted_R[n_named:] = -1
    if align == 1:
        return sorted_R[:n_slots], inverse_R, ends_E, counts_E
    n_slots = int(ends_E[-1]) if n_slots is None else n_slots
    order_P = ids_R.new_full((n_slots + 1,), -1)  # no expert: slot -1
    order_P[slot_R] = sorted_R
    return order_P[:-1], inverse_R, ends_E, counts_E


@_permutation.register_fake
def _(
    ids_R: Tensor, n_experts: int, align: int, n_slots: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    slots = torch.library.get_ctx().new_dynamic_size() if n_slots is None else n_slots
    order_P, inverse_R = ids_R.new_empty(slots), ids_R.new_empty(ids_R.shape[0])
    return order_P, inverse_R, ids_R.new_empty(n_experts), ids_R.new_empty(n_experts)


@torch.library.custom_op("phalanx::gather_rows", mutates_args=())
def _gather_rows(x_TD: Tensor, order_P: Tensor, inverse_R: Tensor, top_k: int) -> Tensor:
    if device.on_accelerator(x_TD):
        from kernels.moe.permute_triton import gather

        with device.launching_on(x_TD):
            return gather(x_TD, order_P, inverse_R, top_k)
    return _select(x_TD, order_P, top_k)


@_gather_rows.register_fake
def _(x_TD: Tensor, order_P: Tensor, inverse_R: Tensor, top_k: int) -> Tensor:
    return x_TD.new_empty(order_P.shape[0], x_TD.shape[1])


@torch.library.custom_op("phalanx::combine_rows", mutates_args=())
def _combine_rows(rows_PD: Tensor, order_P: Tensor, inverse_R: Tensor, top_k: int) -> Tensor:
    """order_P: for the gradient."""
    if device.on_accelerator(rows_PD):
        from kernels.moe.permute_triton import combine

        with device.launching_on(rows_PD):
            return combine(rows_PD, inverse_R, top_k)
    return _select(rows_PD, inverse_R, 1) if top_k == 1 else _sum_rows(rows_PD, inverse_R, top_k)


@_combine_rows.register_fake
def _(rows_PD: Tensor, order_P: Tensor, inverse_R: Tensor, top_k: int) -> Tensor:
    return rows_PD.new_empty(inverse_R.shape[0] // top_k, rows_PD.shape[1])


def _select(x_ND: Tensor, index_M: Tensor, divisor: int) -> Tensor:
    """`x[index // divisor]`, zero where the index is -1, on a CPU."""
    if not len(x_ND):
        return x_ND.new_zeros(len(index_M), x_ND.shape[1])
    empty_M = index_M < 0
    missing = bool(empty_M.any())
    source_M = index_M.clamp(min=0) if missing else index_M
    rows_MD = x_ND.index_select(0, source_M if divisor == 1 else source_M // divisor)
    return rows_MD.masked_fill_(empty_M[:, None], 0) if missing else rows_MD


_PIECE = 2**17
"""Elements of the buffers of `_sum_rows`, which stay in cache."""


def _sum_rows(rows_PD: Tensor, inverse_R: Tensor, top_k: int) -> Tensor:
    """`combine_rows` on a CPU, some tokens at a time, in fp32 or in one addition (which also rounds
    once). 4096 rows of width 1024 in bf16, two per token: 0.6 ms; one gather and one sum, whose
    rows are written to memory and read back: 3.9 ms."""
    width = rows_PD.shape[1]
    slots_KT = inverse_R.view(-1, top_k).T.contiguous()
    y_TD = rows_PD.new_empty(slots_KT.shape[1], width)
    missing = bool((slots_KT < 0).any())
    if missing and not len(rows_PD):
        return y_TD.zero_()
    step = min(max(_PIECE // max(width, 1), 1), max(len(y_TD), 1))
    exact = torch.promote_types(rows_PD.dtype, torch.float32)
    total = rows_PD.new_empty(step, width, dtype=exact)
    buffers = rows_PD.new_empty(2, step, width).unbind(0)

    def pick(slots_t: Tensor, into: Tensor) -> Tensor:
        rows_tD = into[: len(slots_t)]
        torch.index_select(rows_PD, 0, slots_t.clamp(min=0) if missing else slots_t, out=rows_tD)
        return rows_tD.masked_fill_((slots_t < 0)[:, None], 0) if missing else rows_tD

    for y_tD, *slots in zip(y_TD.split(step), *(s.split(step) for s in slots_KT), strict=True):
        first, second = (pick(s, into) for s, into in zip(slots, buffers, strict=False))
        if top_k == 2:
            torch.add(first, second, out=y_tD)
            continue
        sum_tD = total[: len(y_tD)].copy_(first).add_(second)
        for slots_t in slots[2:]:
            sum_tD += pick(slots_t, buffers[0])
        y_tD.copy_(sum_tD)
    return y_TD


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    _, order_P, inverse_R, ctx.top_k = inputs
    ctx.save_for_backward(order_P, inverse_R)


def _gather_gradient(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None, None, None]:
    return _combine_rows(grad_PD, *ctx.saved_tensors, ctx.top_k), None, None, None


def _combine_gradient(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None, None]:
    return _gather_rows(grad_TD, *ctx.saved_tensors, ctx.top_k), None, None, None


_gather_rows.register_autograd(_gather_gradient, setup_context=_save)
_combine_rows.register_autograd(_combine_gradient, setup_context=_save)

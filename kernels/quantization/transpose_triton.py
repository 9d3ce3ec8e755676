"""Copies of FP8 matrices in the memory order that the tensor cores read.

Those of Hopper read operands that are contiguous along the summed dimension. A weight that was
gathered from shards has one order, and the product for the input gradient sums over the other. A
program reads a tile along one dimension, transposes it in shared memory and writes it along the
other, so both passes are contiguous; torch's copy reads or writes single bytes.

Shapes: E experts, R rows, K columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 128


def to_row_major(x_ERK: Tensor, out: Tensor | None = None) -> Tensor:
    """A copy of matrices whose columns are contiguous (`stride(1) == 1`), with contiguous rows.

    x: `[E, R, K]`, one byte per element. Returns `[E, R, K16]`: K rounded up to a multiple of 16,
    as TMA requires, with zeros in the added columns; `out` if given.
    """
    assert x_ERK.stride(1) == 1 and x_ERK.element_size() == 1, (x_ERK.stride(), x_ERK.dtype)
    E, R, K = x_ERK.shape
    padded = triton.cdiv(K, 16) * 16
    if out is None:
        out = torch.empty(E, R, padded, dtype=x_ERK.dtype, device=x_ERK.device)
    assert out.shape == (E, R, padded) and out.is_contiguous(), (out.shape, out.stride())
    if out.numel():
        _transpose[(triton.cdiv(R, _TILE), triton.cdiv(padded, _TILE), E)](
            x_ERK.view(torch.uint8), out.view(torch.uint8), R, K, padded,
            x_ERK.stride(0), x_ERK.stride(2), TILE=_TILE, num_warps=8,
        )  # fmt: skip
    return out


@triton.jit
def _transpose(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, R, K, padded, x_stride_e, x_stride_k, TILE: tl.constexpr
):
    expert = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    at = x_ptr + expert * x_stride_e + columns[:, None] * x_stride_k + rows[None, :]
    values = tl.load(at, mask=(columns < K)[:, None] & (rows < R)[None, :], other=0)
    at = out_ptr + (expert * R + rows)[:, None] * padded + columns[None, :]
    tl.store(at, tl.trans(values), mask=(rows < R)[:, None] & (columns < padded)[None, :])

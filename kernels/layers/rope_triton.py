"""Triton form of `kernels.layers.rope`: each head is read and written once, with any strides."""

import triton
import triton.language as tl
from torch import Tensor

_TILE = 2048
"""Pairs per program."""


def rotate(
    x_THC: Tensor, cos_Tc: Tensor, sin_Tc: Tensor, interleaved: bool, inverse: bool
) -> Tensor:
    """`kernels.layers.rope.rotate` without autograd."""
    x_THC = x_THC if x_THC.stride(2) == 1 else x_THC.contiguous()
    T, H, C = x_THC.shape
    out = x_THC.new_empty(x_THC.shape)
    if out.numel():
        pairs = triton.next_power_of_2(C // 2)
        rows = max(_TILE // pairs, 1)
        _rotate[(triton.cdiv(T * H, rows),)](
            x_THC, cos_Tc.contiguous(), sin_Tc.contiguous(), out, T * H, H, C,
            x_THC.stride(0), x_THC.stride(1), -1.0 if inverse else 1.0,
            INTERLEAVED=interleaved, ROWS=rows, PAIRS=pairs,
        )  # fmt: skip
    return out


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    x_ptr, cos_ptr, sin_ptr, out_ptr, n_rows, H, C, token_stride, head_stride, sign,
    INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tokens = rows // H
    pairs = tl.arange(0, PAIRS)
    inside = (rows < n_rows)[:, None] & (pairs < C // 2)[None, :]
    at = tokens[:, None] * (C // 2) + pairs[None, :]
    cos = tl.load(cos_ptr + at, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + at, mask=inside, other=0.0) * sign
    base = x_ptr + (tokens * token_stride + (rows - tokens * H) * head_stride)[:, None]
    out = out_ptr + (rows * C)[:, None]
    if INTERLEAVED:
        # whole cache lines, then split: loads with stride two would each fetch every line
        columns = tl.arange(0, 2 * PAIRS)[None, :]
        mask = (rows < n_rows)[:, None] & (columns < C)
        x = tl.load(base + columns, mask=mask, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, (ROWS, PAIRS, 2)))
        turned = tl.join(first * cos - second * sin, second * cos + first * sin)
        turned = tl.reshape(turned, (ROWS, 2 * PAIRS))
        tl.store(out + columns, turned.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        at = pairs[None, :]
        first = tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(base + C // 2 + at, mask=inside, other=0.0).to(tl.float32)
        dtype = out_ptr.dtype.element_ty
        tl.store(out + at, (first * cos - second * sin).to(dtype), mask=inside)
        tl.store(out + C // 2 + at, (second * cos + first * sin).to(dtype), mask=inside)

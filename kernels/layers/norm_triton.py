"""Triton form of `kernels.layers.norm`: a tile of whole rows per program, read once.

Narrow rows (QK-norm: 64 or 128 wide) share a program, so that all its warps have work. The
backward is persistent: a fixed number of programs iterate over the rows and keep the gradient of
the weight in registers; for rows wider than 8192 that spills, and is slower but correct.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096
"""Elements of a tile of narrow rows."""
_PROGRAMS = 264
"""In backward: two for each SM of a large GPU."""


def forward(x: Tensor, weight_D: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """`kernels.layers.norm.rms_norm` without autograd, and the values to keep for backward."""
    x_RD, y = _rows(x), x.new_empty(x.shape)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    R, D = x_RD.shape
    if y.numel():
        tile = _tile(R, D)
        _forward[(triton.cdiv(R, tile["ROWS"]),)](
            x_RD, weight_D, y, rstd, R, D, x_RD.stride(0), eps, **tile
        )
    return y, rstd


def backward(
    grad: Tensor, x: Tensor, weight_D: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """`kernels.layers.norm.rms_norm_backward_reference` in one pass."""
    x_RD, grad_RD, grad_x = _rows(x), _rows(grad), x.new_empty(x.shape)
    R, D = x_RD.shape
    tile = _tile(R, D)
    programs = min(triton.cdiv(R, tile["ROWS"]), _PROGRAMS)
    partial = None
    if weight_D is not None:
        partial = x.new_empty(programs, D, dtype=torch.float32)
    if grad_x.numel():
        _backward[(programs,)](
            grad_RD, x_RD, weight_D, rstd, grad_x, partial, R, D, grad_RD.stride(0),
            x_RD.stride(0), **tile,
        )  # fmt: skip
    if partial is None or weight_D is None:
        return grad_x, grad.new_empty(0)
    return grad_x, partial.sum(0).to(weight_D.dtype)


def _rows(x: Tensor) -> Tensor:
    """`[R, D]`, a view if the rows have a constant stride."""
    x_RD = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return x_RD if x_RD.stride(1) == 1 else x_RD.contiguous()


def _tile(R: int, D: int) -> dict[str, int]:
    """Rows and columns per program, and warps: 8 elements per thread, more where rows are long."""
    columns = max(triton.next_power_of_2(D), 128)
    rows = min(max(_TILE // columns, 1), triton.next_power_of_2(max(R, 1)))
    warps = min(max(rows * columns // 256, 4), 16)
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": warps}


@triton.jit
def _normed(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, rstd_ptr, R, D, x_stride, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < R)[:, None] & (columns < D)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    rstd = 1 / tl.sqrt_rn(tl.sum(x * x, 1) / D + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < R)
    y = x * rstd[:, None]
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
        y = y * weight[None, :]
    return y, rows, columns, inside


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, y_ptr, rstd_ptr, R, D, x_stride, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    y, rows, columns, inside = _normed(
        x_ptr, weight_ptr, rstd_ptr, R, D, x_stride, eps, ROWS, COLUMNS
    )
    at = y_ptr + rows[:, None] * D + columns[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    grad_ptr, x_ptr, weight_ptr, rstd_ptr, grad_x_ptr, partial_ptr, R, D, grad_stride, x_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, COLUMNS)
    sums = tl.zeros((COLUMNS,), tl.float32)
    step = tl.num_programs(0) * ROWS
    for start in range(tl.program_id(0) * ROWS, R, step):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        inside = (rows < R)[:, None] & (columns < D)[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0)
        at = grad_ptr + rows[:, None] * grad_stride + columns[None, :]
        grad = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < R, other=0.0)[:, None]
        normed = x.to(tl.float32) * rstd
        if weight_ptr is not None:
            sums += tl.sum(grad * normed, 0)
            weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
            grad = grad * weight[None, :]
        inner = tl.sum(grad * normed, 1) / D
        grad_x = (grad - normed * inner[:, None]) * rstd
        at = grad_x_ptr + rows[:, None] * D + columns[None, :]
        tl.store(at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    if weight_ptr is not None:
        at = partial_ptr + tl.program_id(0).to(tl.int64) * D + columns
        tl.store(at, sums, mask=columns < D)

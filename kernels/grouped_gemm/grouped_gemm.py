"""Grouped GEMM: one matrix product per expert over contiguous rows.

| product | function | sums over |
|---|---|---|
| output, `y[r] = x[r] @ w[e].T` | `grouped_gemm_nt` | input width |
| input gradient, `dx[r] = dy[r] @ w[e]` | `grouped_gemm_nn` | output width |
| weight gradient, `dw[e] = dy_e.T @ x_e` | `grouped_gemm_tn` | rows of the group |

Group e consists of rows `[ends[e - 1], ends[e])`, of which the first `counts[e]` are true rows. The
rows between a group's last true row and its end must be zero (alignment), and so are their outputs.
Rows past the last end belong to no group: they are not read, and undefined in the output. A group
without rows has the weight gradient zero.

Dtype: that of the operands (bf16 or fp32) with fp32 accumulation inside; gradients of weights in
fp32 on request. On CUDA, bf16 uses torch's own `_grouped_mm` where that supports the operands,
until `kernels.grouped_gemm.grouped_gemm_triton` has been measured, which computes the rest. On a
CPU it is a loop of `mm` with rounded sizes (`kernels.grouped_gemm.grouped_gemm_cpu`). `_grouped_mm`
is a loop there, too, and as fast once code for every size is generated; until then its forward of
4096 rows in 8 groups (N 512, K 256, bf16) takes 5.1 ms instead of 2.8 (one thread of a 2-core AMD
EPYC, torch 2.13).

Shapes: R rows, N output width, K input width, E groups.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kernels import device
from kernels.grouped_gemm.grouped_gemm_cpu import multiply_rows, sum_over_rows

Implementation = Literal["torch", "triton"]


def grouped_gemm_nt(
    x_RK: Tensor, w_ENK: Tensor, ends_E: Tensor, counts_E: Tensor,
    implementation: Implementation | None = None,
) -> Tensor:  # fmt: skip
    """`y_RN`, with `y[r] = x[r] @ w[e].T` for the rows of group e. Differentiable in x and w.

    ends_E: int32 or int64, non-decreasing, at most R. counts_E: true rows per group, at most the
    length of the group. implementation: on CUDA; None chooses by measurements.
    """
    _check("nt", x_RK, w_ENK, x_RK.shape[1], w_ENK.shape[2], ends_E, counts_E)
    y_RN: Tensor = _nt(x_RK, w_ENK, ends_E, counts_E, _named(implementation))
    return y_RN


def grouped_gemm_nn(
    dy_RN: Tensor, w_ENK: Tensor, ends_E: Tensor, counts_E: Tensor,
    implementation: Implementation | None = None,
) -> Tensor:  # fmt: skip
    """`dx_RK`, with `dx[r] = dy[r] @ w[e]`, otherwise as `grouped_gemm_nt`; not differentiable."""
    _check("nn", dy_RN, w_ENK, dy_RN.shape[1], w_ENK.shape[1], ends_E, counts_E)
    dx_RK: Tensor = _nn(dy_RN, w_ENK, ends_E, counts_E, _named(implementation))
    return dx_RK


def grouped_gemm_tn(
    dy_RN: Tensor, x_RK: Tensor, ends_E: Tensor, counts_E: Tensor,
    out_dtype: torch.dtype | None = None, implementation: Implementation | None = None,
) -> Tensor:  # fmt: skip
    """`dw_ENK`, with `dw[e]` the sum of `dy[r].T @ x[r]` over the rows of group e; not
    differentiable.

    out_dtype: fp32 or, by default, the operands'.
    """
    _check("tn", dy_RN, x_RK, len(dy_RN), len(x_RK), ends_E, counts_E)
    out_dtype = dy_RN.dtype if out_dtype is None else out_dtype
    if out_dtype not in (dy_RN.dtype, torch.float32):
        raise ValueError(
            f"grouped_gemm_tn: out_dtype is {out_dtype}, must be {dy_RN.dtype} or fp32"
        )
    dw_ENK: Tensor = _tn(dy_RN, x_RK, ends_E, counts_E, out_dtype, _named(implementation))
    return dw_ENK


def grouped_gemm_nt_reference(
    x_RK: Tensor, w_ENK: Tensor, ends_E: Tensor, counts_E: Tensor
) -> Tensor:
    """Plain loops, fp32 products; rows outside every group are zero."""
    y_RN = x_RK.new_zeros(x_RK.shape[0], w_ENK.shape[1])
    for e, rows in enumerate(true_rows(ends_E, counts_E)):
        for r in range(rows.start, rows.stop):
            y_RN[r] = (w_ENK[e].float() @ x_RK[r].float()).to(x_RK.dtype)
    return y_RN


def grouped_gemm_nn_reference(
    dy_RN: Tensor, w_ENK: Tensor, ends_E: Tensor, counts_E: Tensor
) -> Tensor:
    """Plain loops, fp32 products; rows outside every group are zero."""
    return grouped_gemm_nt_reference(dy_RN, w_ENK.mT, ends_E, counts_E)


def grouped_gemm_tn_reference(
    dy_RN: Tensor, x_RK: Tensor, ends_E: Tensor, counts_E: Tensor,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Plain loop over the groups, fp32 products."""
    shape = (len(ends_E), dy_RN.shape[1], x_RK.shape[1])
    total = torch.zeros(shape, device=x_RK.device)
    for e, rows in enumerate(true_rows(ends_E, counts_E)):
        total[e] = dy_RN[rows].float().T @ x_RK[rows].float()
    return total.to(dy_RN.dtype if out_dtype is None else out_dtype)


def true_rows(ends_E: Tensor, counts_E: Tensor) -> list[slice]:
    """Every group's rows without the zero rows after them; waits for the device."""
    starts = [0, *ends_E.tolist()][:-1]
    return [slice(s, s + n) for s, n in zip(starts, counts_E.tolist(), strict=True)]


@torch.library.custom_op("phalanx::grouped_gemm_nt", mutates_args=())
def _nt(
    x_RK: Tensor, w_ENK: Tensor, ends_E: Tensor, counts_E: Tensor, implementation: str
) -> Tensor:
    return _by_rows(x_RK, w_ENK, ends_E, counts_E, implementation)


@_nt.register_fake
def _(x_RK: Tensor, w_ENK: Tensor, ends_E: Tensor, counts_E: Tensor, implementation: str) -> Tensor:
    return x_RK.new_empty(x_RK.shape[0], w_ENK.shape[1])


@torch.library.custom_op("phalanx::grouped_gemm_nn", mutates_args=())
def _nn(
    dy_RN: Tensor, w_ENK: Tensor, ends_E: Tensor, counts_E: Tensor, implementation: str
) -> Tensor:
    return _by_rows(dy_RN, w_ENK.mT, ends_E, counts_E, implementation)


@_nn.register_fake
def _(
    dy_RN: Tensor, w_ENK: Tensor, ends_E: Tensor, counts_E: Tensor, implementation: str
) -> Tensor:
    return dy_RN.new_empty(dy_RN.shape[0], w_ENK.shape[2])


@torch.library.custom_op("phalanx::grouped_gemm_tn", mutates_args=())
def _tn(
    dy_RN: Tensor, x_RK: Tensor, ends_E: Tensor, counts_E: Tensor, out_dtype: torch.dtype,
    implementation: str,
) -> Tensor:  # fmt: skip
    if out_dtype == x_RK.dtype and _is_torch(implementation, dy_RN.T, x_RK):
        return torch._grouped_mm(dy_RN.T, x_RK, offs=ends_E.to(torch.int32))
    dw_ENK = x_RK.new_empty(len(ends_E), dy_RN.shape[1], x_RK.shape[1], dtype=out_dtype)
    if device.on_accelerator(x_RK):
        _launch_by_groups(dy_RN, x_RK, ends_E, counts_E, dw_ENK)
        return dw_ENK
    for e, rows in enumerate(true_rows(ends_E, counts_E)):
        if out_dtype == x_RK.dtype:
            sum_over_rows(dy_RN[rows], x_RK[rows], dw_ENK[e])
        else:
            torch.mm(dy_RN[rows].float().T, x_RK[rows].float(), out=dw_ENK[e])
    return dw_ENK


@_tn.register_fake
def _(
    dy_RN: Tensor, x_RK: Tensor, ends_E: Tensor, counts_E: Tensor, out_dtype: torch.dtype,
    implementation: str,
) -> Tensor:  # fmt: skip
    return x_RK.new_empty(ends_E.shape[0], dy_RN.shape[1], x_RK.shape[1], dtype=out_dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.implementation = inputs[4]


def _gradients(ctx: Any, dy_RN: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    x_RK, w_ENK, *groups = ctx.saved_tensors
    dy_RN = dy_RN.contiguous()
    dx_RK = dw_ENK = None
    if ctx.needs_input_grad[0]:
        dx_RK = _nn(dy_RN, w_ENK, *groups, ctx.implementation)
    if ctx.needs_input_grad[1]:
        dw_ENK = _tn(dy_RN, x_RK, *groups, w_ENK.dtype, ctx.implementation)
    return dx_RK, dw_ENK, None, None, None


_nt.register_autograd(_gradients, setup_context=_save)


def _by_rows(
    x_RK: Tensor, w_ENK: Tensor, ends_E: Tensor, counts_E: Tensor, implementation: str
) -> Tensor:
    """`x[r] @ w[e].T` for the rows of group e."""
    if _is_torch(implementation, x_RK, w_ENK.mT):
        return torch._grouped_mm(x_RK, w_ENK.mT, offs=ends_E.to(torch.int32))
    if device.on_accelerator(x_RK):
        return _launch_by_rows(x_RK, w_ENK, ends_E, counts_E)
    groups = true_rows(ends_E, counts_E)
    y_RN = zeros_outside(x_RK, w_ENK.shape[1], groups)
    multiply_rows(x_RK, w_ENK, groups, y_RN)
    return y_RN


def zeros_outside(
    like_R: Tensor, width: int, groups: list[slice], dtype: torch.dtype | None = None
) -> Tensor:
    """An output whose rows outside all groups are zero; the caller writes the rows inside."""
    covered = sum(rows.stop - rows.start for rows in groups)
    make = like_R.new_empty if covered == like_R.shape[0] else like_R.new_zeros
    return make(like_R.shape[0], width, dtype=dtype)


def _launch_by_rows(a_RK: Tensor, b_ENK: Tensor, ends_E: Tensor, counts_E: Tensor) -> Tensor:
    from kernels.grouped_gemm.grouped_gemm_triton import by_rows

    y_RN = a_RK.new_empty(a_RK.shape[0], b_ENK.shape[1])
    if not a_RK.shape[1]:
        return y_RN.zero_()
    if y_RN.numel() and len(ends_E):
        with device.launching_on(a_RK):
            by_rows(a_RK, None, b_ENK, None, ends_E, counts_E, y_RN)
    return y_RN


def _launch_by_groups(
    dy_RN: Tensor, x_RK: Tensor, ends_E: Tensor, counts_E: Tensor, dw_ENK: Tensor
) -> None:
    from kernels.grouped_gemm.grouped_gemm_triton import by_groups

    if dw_ENK.numel() and len(x_RK):
        with device.launching_on(x_RK):
            by_groups(dy_RN, None, x_RK, None, ends_E, counts_E, dw_ENK)
    else:
        dw_ENK.zero_()


def _is_torch(implementation: str, a: Tensor, b: Tensor) -> bool:
    """Whether `torch._grouped_mm(a, b)` computes the product."""
    if not device.on_accelerator(a) or implementation == "triton":
        return False
    return implementation == "torch" or (a.dtype == torch.bfloat16 and _whole_words(a, b))


def _whole_words(*operands: Tensor) -> bool:
    """What torch requires: one dimension contiguous, the others' strides multiples of 16 bytes."""
    for x in operands:
        *_, rows, columns = x.stride()
        step = rows if columns == 1 else columns
        if 1 not in (rows, columns) or step * x.element_size() % 16 or x.data_ptr() % 16:
            return False
    return True


def _named(implementation: Implementation | None) -> str:
    """The implementation for an operator, which allows no None: "" if the caller did not choose."""
    if implementation is not None and implementation not in get_args(Implementation):
        raise ValueError(
            f"grouped_gemm: implementation is {implementation!r}, must be 'torch' or 'triton'"
        )
    return implementation or ""


def _check(
    name: str, a: Tensor, b: Tensor, sum_a: int, sum_b: int, ends_E: Tensor, counts_E: Tensor
) -> None:
    problem = None
    n_groups = b.shape[0] if b.dim() == 3 else len(ends_E)
    if sum_a != sum_b:
        problem = f"cannot sum over {sum_a} and {sum_b}"
    elif a.dtype != b.dtype:
        problem = f"operands are {a.dtype} and {b.dtype}, must be of one dtype"
    elif ends_E.shape != (n_groups,) or counts_E.shape != (n_groups,):
        problem = (
            f"ends and counts are {list(ends_E.shape)} and {list(counts_E.shape)}, must be "
            f"[{n_groups}]"
        )
    if problem:
        raise ValueError(f"grouped_gemm_{name}: {problem}")

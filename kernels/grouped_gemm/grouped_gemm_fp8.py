"""Grouped GEMMs of blockwise-quantized FP8 operands: the experts' products of
`kernels.gemm.gemm_fp8`.

| product | function | sums over | operands |
|---|---|---|---|
| output, `y[r] = x[r] @ w[e].T` | `grouped_gemm_fp8_nt` | input width | x 1x128, w 128x128 |
| input gradient, `dx[r] = dy[r] @ w[e]` | `grouped_gemm_fp8_nn` | output width | dy, w alike |
| weight gradient, `dw[e] = dy_e.T @ x_e` | `grouped_gemm_fp8_tn` | the group's rows | both 128x1 |

Groups are those of `kernels.grouped_gemm.grouped_gemm`: contiguous rows, ends and true counts on
the device, zero rows between them, and rows of no group after the last end. Scales are as in
`kernels.quantization.quantize`; those of the weight gradient come from `quantize_128x1_grouped`,
whose blocks restart with every group, so a block of 128 rows never mixes experts.

On a CPU the groups are dequantized and multiplied one after the other, as in
`kernels.gemm.gemm_fp8`. On a GPU `implementation` selects the kernel, as there.

Shapes: R rows, N output width, K input width, E experts; n, k their numbers of blocks of 128,
g = R // 128 + E.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels import device
from kernels.fp8 import BLOCK, fp8_dtype
from kernels.gemm.gemm_fp8 import (
    FP8_DTYPES,
    OUT_DTYPES,
    Implementation,
    dense_kernel,
    factors,
    operand,
    problem_of_implementation,
)
from kernels.grouped_gemm.grouped_gemm import true_rows, zeros_outside
from kernels.grouped_gemm.grouped_gemm_cpu import multiply, sum_over_rows
from kernels.quantization.quantize import (
    dequantize_1x128,
    dequantize_128x1_grouped,
    dequantize_128x128,
    group_blocks,
)


def grouped_gemm_fp8_nt(
    x_RK: Tensor, scales_Rk: Tensor, w_ENK: Tensor, scales_Enk: Tensor,
    ends_E: Tensor, counts_E: Tensor, out_dtype: torch.dtype = torch.bfloat16,
    implementation: Implementation = "triton",
) -> Tensor:  # fmt: skip
    """`y_RN` in `out_dtype` (bf16 or fp32): `x[r] @ w[e].T` for the rows of group e, zero for its
    zero rows, undefined from the last end on. x from `quantize_1x128`, w from `quantize_128x128`.
    """
    _check_rows(
        "nt", x_RK, scales_Rk, w_ENK, scales_Enk, 2, ends_E, counts_E, out_dtype, implementation
    )
    y_RN: Tensor = _nt(
        x_RK, scales_Rk, w_ENK, scales_Enk, ends_E, counts_E, out_dtype, implementation
    )
    return y_RN


def grouped_gemm_fp8_nn(
    dy_RN: Tensor, scales_Rn: Tensor, w_ENK: Tensor, scales_Enk: Tensor,
    ends_E: Tensor, counts_E: Tensor, out_dtype: torch.dtype = torch.bfloat16,
    implementation: Implementation = "triton",
) -> Tensor:  # fmt: skip
    """`dx_RK`: `dy[r] @ w[e]`, otherwise as `grouped_gemm_fp8_nt`. w: the column-major form that
    `quantize_128x128` also returns; row-major data is copied on CUDA."""
    _check_rows(
        "nn", dy_RN, scales_Rn, w_ENK, scales_Enk, 1, ends_E, counts_E, out_dtype, implementation
    )
    dx_RK: Tensor = _nn(
        dy_RN, scales_Rn, w_ENK, scales_Enk, ends_E, counts_E, out_dtype, implementation
    )
    return dx_RK


def grouped_gemm_fp8_tn(
    dy_RN: Tensor, scales_gN: Tensor, x_RK: Tensor, scales_gK: Tensor,
    ends_E: Tensor, counts_E: Tensor, out_dtype: torch.dtype = torch.bfloat16,
    align: int = 1, implementation: Implementation = "triton",
) -> Tensor:  # fmt: skip
    """`dw_ENK`: `dy_e.T @ x_e` over the rows of group e, zero for an empty one. Operands from
    `quantize_128x1_grouped` with the same ends and counts.

    align: a number that divides all ends. 128 is fastest; below 16 TMA cannot be used.
    """
    n_blocks = len(x_RK) // BLOCK + len(ends_E)
    problem = problem_of_implementation(implementation, x_RK)
    problem = problem or _problem_of_groups(dy_RN, x_RK, ends_E, counts_E, len(ends_E), out_dtype)
    if dy_RN.shape[0] != x_RK.shape[0]:
        problem = f"cannot sum over {dy_RN.shape[0]} and {x_RK.shape[0]} rows"
    for scales, data in ((scales_gN, dy_RN), (scales_gK, x_RK)):
        if scales.shape != (n_blocks, data.shape[1]) or scales.dtype != torch.float32:
            problem = (
                f"scales are {list(scales.shape)} in {scales.dtype}, must be "
                f"{[n_blocks, data.shape[1]]} in fp32: from quantize_128x1_grouped"
            )
    if problem:
        raise ValueError(f"grouped_gemm_fp8_tn: {problem}")
    dw_ENK: Tensor = _tn(
        dy_RN, scales_gN, x_RK, scales_gK, ends_E, counts_E, out_dtype, align, implementation
    )  # fmt: skip
    return dw_ENK


def row_alignment(device_type: str) -> int:
    """Number of rows that group starts should be a multiple of, for the weight gradient: there rows
    are the innermost dimension in memory, and TMA reads whole blocks without masks."""
    return BLOCK if device_type == "cuda" else 1


def grouped_gemm_fp8_nt_reference(
    x_RK: Tensor, scales_Rk: Tensor, w_ENK: Tensor, scales_Enk: Tensor,
    ends_E: Tensor, counts_E: Tensor, out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """Plain loop over the groups, fp32 products; rows outside every group are zero."""
    y_RN = torch.zeros(len(x_RK), w_ENK.shape[1], dtype=out_dtype, device=x_RK.device)
    for e, rows in enumerate(true_rows(ends_E, counts_E)):
        x = dequantize_1x128(x_RK[rows], scales_Rk[rows])
        y_RN[rows] = (x @ dequantize_128x128(w_ENK[e], scales_Enk[e]).T).to(out_dtype)
    return y_RN


def grouped_gemm_fp8_nn_reference(
    dy_RN: Tensor, scales_Rn: Tensor, w_ENK: Tensor, scales_Enk: Tensor,
    ends_E: Tensor, counts_E: Tensor, out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """Plain loop over the groups, fp32 products; rows outside every group are zero."""
    return grouped_gemm_fp8_nt_reference(
        dy_RN, scales_Rn, w_ENK.mT, scales_Enk.mT, ends_E, counts_E, out_dtype
    )


def grouped_gemm_fp8_tn_reference(
    dy_RN: Tensor, scales_gN: Tensor, x_RK: Tensor, scales_gK: Tensor,
    ends_E: Tensor, counts_E: Tensor, out_dtype: torch.dtype = torch.bfloat16,
    align: int = 1,
) -> Tensor:  # fmt: skip
    """Plain loop over the groups, fp32 products."""
    dy = dequantize_128x1_grouped(dy_RN, scales_gN, ends_E, counts_E)
    x = dequantize_128x1_grouped(x_RK, scales_gK, ends_E, counts_E)
    total = torch.zeros(len(ends_E), dy.shape[1], x.shape[1], device=x.device)
    for e, rows in enumerate(true_rows(ends_E, counts_E)):
        total[e] = dy[rows].T @ x[rows]
    return total.to(out_dtype)


@torch.library.custom_op("phalanx::grouped_gemm_fp8_nt", mutates_args=())
def _nt(
    x_RK: Tensor, scales_Rk: Tensor, w_ENK: Tensor, scales_Enk: Tensor,
    ends_E: Tensor, counts_E: Tensor, out_dtype: torch.dtype, implementation: str,
) -> Tensor:  # fmt: skip
    return _by_rows(x_RK, scales_Rk, w_ENK, scales_Enk, ends_E, counts_E, out_dtype, implementation)


@_nt.register_fake
def _(
    x_RK: Tensor, scales_Rk: Tensor, w_ENK: Tensor, scales_Enk: Tensor,
    ends_E: Tensor, counts_E: Tensor, out_dtype: torch.dtype, implementation: str,
) -> Tensor:  # fmt: skip
    return x_RK.new_empty(x_RK.shape[0], w_ENK.shape[1], dtype=out_dtype)


@torch.library.custom_op("phalanx::grouped_gemm_fp8_nn", mutates_args=())
def _nn(
    dy_RN: Tensor, scales_Rn: Tensor, w_ENK: Tensor, scales_Enk: Tensor,
    ends_E: Tensor, counts_E: Tensor, out_dtype: torch.dtype, implementation: str,
) -> Tensor:  # fmt: skip
    return _by_rows(
        dy_RN, scales_Rn, w_ENK.mT, scales_Enk.mT, ends_E, counts_E, out_dtype, implementation
    )


@_nn.register_fake
def _(
    dy_RN: Tensor, scales_Rn: Tensor, w_ENK: Tensor, scales_Enk: Tensor,
    ends_E: Tensor, counts_E: Tensor, out_dtype: torch.dtype, implementation: str,
) -> Tensor:  # fmt: skip
    return dy_RN.new_empty(dy_RN.shape[0], w_ENK.shape[2], dtype=out_dtype)


@torch.library.custom_op("phalanx::grouped_gemm_fp8_tn", mutates_args=())
def _tn(
    dy_RN: Tensor, scales_gN: Tensor, x_RK: Tensor, scales_gK: Tensor,
    ends_E: Tensor, counts_E: Tensor, out_dtype: torch.dtype, align: int,
    implementation: str,
) -> Tensor:  # fmt: skip
    shape = (len(ends_E), dy_RN.shape[1], x_RK.shape[1])
    dw_ENK = x_RK.new_empty(shape, dtype=out_dtype)
    _by_groups(dy_RN, scales_gN, x_RK, scales_gK, ends_E, counts_E, dw_ENK, align, implementation)
    return dw_ENK


@_tn.register_fake
def _(
    dy_RN: Tensor, scales_gN: Tensor, x_RK: Tensor, scales_gK: Tensor,
    ends_E: Tensor, counts_E: Tensor, out_dtype: torch.dtype, align: int,
    implementation: str,
) -> Tensor:  # fmt: skip
    shape = (ends_E.shape[0], dy_RN.shape[1], x_RK.shape[1])
    return x_RK.new_empty(shape, dtype=out_dtype)


def _by_rows(
    a_RK: Tensor, scales_Rk: Tensor, b_ENK: Tensor, scales_Enk: Tensor,
    ends_E: Tensor, counts_E: Tensor, out_dtype: torch.dtype, implementation: str,
) -> Tensor:  # fmt: skip
    """`a[r] @ b[e].T` for the rows of group e."""
    (R, K), N = a_RK.shape, b_ENK.shape[1]
    if not device.on_accelerator(a_RK):
        groups = true_rows(ends_E, counts_E)
        c_RN = zeros_outside(a_RK, N, groups, out_dtype)
        for e, rows in enumerate(groups):
            if rows.stop > rows.start:
                scales = scales_Rk[rows], scales_Enk[e]
                dtype = factors(scales, out_dtype)
                a = operand(a_RK[rows], scales[0], (1, BLOCK), dtype)
                multiply(a, operand(b_ENK[e], scales[1], (BLOCK, BLOCK), dtype).T, c_RN[rows])
        return c_RN
    by_rows, _ = _kernels(implementation)
    fp8_dtype(a_RK.device)  # raises on devices without FP8
    c_RN = a_RK.new_empty(R, N, dtype=out_dtype)
    if not K:
        return c_RN.zero_()
    if c_RN.numel() and len(ends_E):
        with device.launching_on(a_RK):
            by_rows(a_RK, scales_Rk, b_ENK, scales_Enk, ends_E, counts_E, c_RN)
    return c_RN


def _by_groups(
    dy_RN: Tensor, scales_gN: Tensor, x_RK: Tensor, scales_gK: Tensor,
    ends_E: Tensor, counts_E: Tensor, dw_ENK: Tensor, align: int, implementation: str,
) -> None:  # fmt: skip
    if device.on_accelerator(x_RK):
        _, by_groups = _kernels(implementation)
        fp8_dtype(x_RK.device)  # raises on devices without FP8
        if dw_ENK.numel() and len(x_RK):
            operands = dy_RN, scales_gN, x_RK, scales_gK, ends_E, counts_E
            with device.launching_on(x_RK):
                by_groups(*operands, dw_ENK, align)
        else:
            dw_ENK.zero_()
        return
    for e, (whole, n_true, blocks) in enumerate(group_blocks(ends_E, counts_E)):
        rows = slice(whole.start, whole.start + n_true)
        if n_true:
            blocks = slice(blocks.start, blocks.start + -(-n_true // BLOCK))
            dtype = factors((scales_gN[blocks], scales_gK[blocks]), dw_ENK.dtype)
            dy = operand(dy_RN[rows], scales_gN[blocks], (BLOCK, 1), dtype)
            x = operand(x_RK[rows], scales_gK[blocks], (BLOCK, 1), dtype)
            sum_over_rows(dy, x, dw_ENK[e])
        else:
            dw_ENK[e].zero_()


def _kernels(implementation: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """Launchers of outputs by rows and by experts, imported when needed: a CPU has no Triton."""
    if implementation == "gluon":
        dense_kernel(implementation)  # raises if Triton has no Gluon
        from kernels.grouped_gemm import grouped_gemm_fp8_gluon as gluon

        return gluon.by_rows, gluon.by_groups
    from kernels.grouped_gemm.grouped_gemm_triton import by_groups, by_rows

    return by_rows, by_groups


def _check_rows(
    name: str, a: Tensor, scales_a: Tensor, w: Tensor, scales_w: Tensor, summed: int,
    ends_E: Tensor, counts_E: Tensor, out_dtype: torch.dtype, implementation: Implementation,
) -> None:  # fmt: skip
    grid_a = [a.shape[0], -(-a.shape[1] // BLOCK)]
    problem = problem_of_implementation(implementation, a)
    problem = problem or _problem_of_groups(a, w, ends_E, counts_E, w.shape[0], out_dtype)
    if w.dim() != 3 or a.shape[1] != w.shape[summed]:
        problem = f"cannot sum over {a.shape[1]} of {list(a.shape)} and {list(w.shape)}"
    elif list(scales_a.shape) != grid_a or scales_a.dtype != torch.float32:
        problem = f"scales of rows are {list(scales_a.shape)}, must be {grid_a} in fp32"
    else:
        grid_w = [w.shape[0], -(-w.shape[1] // BLOCK), -(-w.shape[2] // BLOCK)]
        if list(scales_w.shape) != grid_w or scales_w.dtype != torch.float32:
            problem = f"scales of w are {list(scales_w.shape)}, must be {grid_w} in fp32"
    if problem:
        raise ValueError(f"grouped_gemm_fp8_{name}: {problem}")


def _problem_of_groups(
    a: Tensor, b: Tensor, ends_E: Tensor, counts_E: Tensor, n_groups: int, out_dtype: torch.dtype
) -> str | None:
    if a.dtype != b.dtype or a.dtype not in FP8_DTYPES:
        return f"operands are {a.dtype} and {b.dtype}, must both be e4m3"
    if out_dtype not in OUT_DTYPES:
        return f"out_dtype is {out_dtype}, must be bf16 or fp32"
    if ends_E.shape != (n_groups,) or counts_E.shape != (n_groups,):
        shapes = f"{list(ends_E.shape)} and {list(counts_E.shape)}"
        return f"ends and counts are {shapes}, must be [{n_groups}]"
    return None

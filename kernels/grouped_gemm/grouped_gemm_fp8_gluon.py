"""Gluon form of the grouped FP8 products for Hopper: tiles of `kernels.grouped_gemm` in the kernel
of `kernels.gemm.gemm_fp8_gluon`. Not measured.

Outputs by rows use the list of tiles of `kernels.group_schedule`. The weights of all experts are
one matrix for TMA: a tile at the right edge of a weight reads rows of the next expert, which belong
to columns that are not stored. Outputs by experts are computed by persistent programs too, so that
the first operands of a tile are loaded while the previous one is stored; a tile's number of steps
follows from the count of its expert.
"""

import triton
from torch import Tensor

from kernels.fp8 import BLOCK
from kernels.gemm.gemm_fp8_gluon import _EXPERTS, _ROWS, choose_rows, hopper, launch
from kernels.gemm.gemm_fp8_triton import Target, k_major, rows_contiguous
from kernels.group_schedule import schedule
from kernels.quantization.transpose_triton import to_row_major


def by_rows(
    a_RK: Tensor, scales_a_Rk: Tensor, b_ENK: Tensor, scales_b_Enk: Tensor,
    ends_E: Tensor, counts_E: Tensor, c_RN: Tensor,
    target: Target | None = None, rows: int | None = None,
) -> None:  # fmt: skip
    """As `kernels.grouped_gemm.grouped_gemm_triton.by_rows` in FP8. Raises ValueError on anything
    but Hopper."""
    target = hopper(target)
    (R, K), (E, N, _) = a_RK.shape, b_ENK.shape
    a_RK, b_NK = k_major(a_RK, target), k_major(_one_below_the_other(b_ENK), target)
    scales_a_Rk = rows_contiguous(scales_a_Rk)
    rows = rows or choose_rows(triton.cdiv(R, 128), E, N, target.n_sm)
    tiles = schedule(ends_E, counts_E, R, rows, split=True)
    launch(
        (a_RK, b_NK), (scales_a_Rk, scales_b_Enk), (scales_a_Rk.stride(1), *scales_b_Enk.stride()),
        c_RN, (R, N, K), (tiles.tiles, None, None, None),
        tiles.n_most * triton.cdiv(N, BLOCK), _ROWS, False, rows, target,
    )  # fmt: skip


def by_groups(
    a_RM: Tensor, scales_a_gM: Tensor, b_RN: Tensor, scales_b_gN: Tensor,
    ends_E: Tensor, counts_E: Tensor, c_EMN: Tensor, align: int,
    target: Target | None = None, rows: int | None = None,
) -> None:  # fmt: skip
    """As `kernels.grouped_gemm.grouped_gemm_triton.by_groups` in FP8. Raises ValueError on anything
    but Hopper, and if `align` is no multiple of 128."""
    target = hopper(target)
    if align % BLOCK:
        raise ValueError(f"implementation 'gluon' needs align to be a multiple of {BLOCK}")
    (R, M), N, E = a_RM.shape, b_RN.shape[1], len(ends_E)
    assert c_EMN.stride(0) == M * c_EMN.stride(1), "the output is one matrix of all experts' rows"
    a_MR, b_NR = k_major(a_RM.T, target), k_major(b_RN.T, target)
    scales_a_gM, scales_b_gN = scales_a_gM.contiguous(), scales_b_gN.contiguous()
    blocks = schedule(ends_E, counts_E, R, BLOCK, split=False).first_E
    rows = rows or choose_rows(E * triton.cdiv(M, 128), 0, N, target.n_sm)
    launch(
        (a_MR, b_NR), (scales_a_gM, scales_b_gN),
        (scales_a_gM.stride(0), 0, 0, scales_b_gN.stride(0)), c_EMN, (M, N, R),
        (None, ends_E, counts_E, blocks), E * triton.cdiv(M, rows) * triton.cdiv(N, BLOCK),
        _EXPERTS, True, rows, target,
    )  # fmt: skip


def _one_below_the_other(b_ENK: Tensor) -> Tensor:
    """The matrices of all experts as one `[E N, K]`, a view if their memory allows it."""
    E, N, K = b_ENK.shape
    if b_ENK.stride(2) == 1 and (E == 1 or b_ENK.stride(0) == N * b_ENK.stride(1)):
        return b_ENK.as_strided((E * N, K), (b_ENK.stride(1), 1))
    if b_ENK.stride(1) == 1 and b_ENK.stride(2) != 1:
        return to_row_major(b_ENK).flatten(0, 1)[:, :K]
    return b_ENK.reshape(E * N, K)

"""128x128 quantization of a weight that is sharded over several ranks.

A block may be spread over several ranks: its largest value is the maximum over them. So there are
two steps: `block_maxima` of the local values, whose element-wise maximum over the ranks is that of
the whole weight, and `quantize_piece` with the scales that follow from it. All ranks together
produce exactly the bits of `kernels.quantization.quantize.quantize_128x128` of the whole weight.

A weight is a matrix, or one per expert; pieces are arbitrary rectangles of its rows and columns.
`copy_column_major` makes the second memory order of a gathered weight.

R rows and C columns of the piece; n, k blocks of the whole weight along its rows (of all experts,
one after another) and columns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import device
from kernels.fp8 import BLOCK, fp8_dtype
from kernels.quantization.quantize import block_scales


def block_maxima(w_RC: Tensor, block_R: Tensor, first_column: int, grid_nk: Tensor) -> None:
    """Raise every block's entry of `grid` to the largest magnitude among its local values.

    block_R: the row of blocks of each row. first_column: offset of the piece in the whole weight. A
    NaN is treated as infinity, since a maximum over ranks may drop NaNs.
    """
    if not w_RC.numel():
        return
    blocks_RkB, first = _in_blocks(w_RC.abs(), first_column)
    maxima_Rk = blocks_RkB.amax(2).nan_to_num_(nan=float("inf"), posinf=float("inf"))
    columns = grid_nk[:, first : first + maxima_Rk.shape[1]]
    columns.scatter_reduce_(0, block_R[:, None].expand_as(maxima_Rk), maxima_Rk, "amax")


def scales_of(maxima: Tensor, power_of_two: bool) -> Tensor:
    """fp32 scales of blocks from their largest magnitudes; NaN if that is infinite."""
    return block_scales(maxima, fp8_dtype(maxima.device), power_of_two)


def quantize_piece(
    w_RC: Tensor, block_R: Tensor, first_column: int, scales_nk: Tensor, out_RC: Tensor
) -> None:
    """Write the piece in FP8, as its bytes (uint8), with the scales of its blocks."""
    if not w_RC.numel():
        return
    blocks_RkB, first = _in_blocks(w_RC, first_column)
    scales_Rk = scales_nk[:, first : first + blocks_RkB.shape[1]][block_R]
    data = (blocks_RkB / scales_Rk[:, :, None]).to(fp8_dtype(w_RC.device)).flatten(1)
    start = first_column % BLOCK
    out_RC.copy_(data[:, start : start + w_RC.shape[1]].view(torch.uint8))


def copy_column_major(data_ENK: Tensor, out_ENK: Tensor) -> None:
    """Copy FP8 matrices with contiguous rows to `out`, from `kernels.fp8.empty_column_major`."""
    if not device.on_accelerator(data_ENK):
        out_ENK.copy_(data_ENK)
        return
    from kernels.quantization.transpose_triton import to_row_major

    E, _, K = data_ENK.shape
    padded = out_ENK.stride(2)  # the rows of the transposed matrices, with their padding
    whole = out_ENK.mT.as_strided((E, K, padded), out_ENK.mT.stride())
    with device.launching_on(data_ENK):
        to_row_major(data_ENK.mT, whole)


def _in_blocks(w_RC: Tensor, first_column: int) -> tuple[Tensor, int]:
    """`[R, blocks, 128]`, zero outside the piece, and the first block's index."""
    before = first_column % BLOCK
    after = -(before + w_RC.shape[1]) % BLOCK
    padded = F.pad(w_RC.float(), (before, after)) if before or after else w_RC.float()
    return padded.unflatten(1, (-1, BLOCK)), first_column // BLOCK

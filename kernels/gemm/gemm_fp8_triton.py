"""Triton form of `kernels.gemm.gemm_fp8`: one persistent kernel for all three layouts.

Tensor cores accumulate FP8 products with fewer mantissa bits than fp32 (about 14 on Hopper), so
after every 128 of K the partial product is read from them, multiplied by its scales and added in
fp32 on the CUDA cores (DeepSeek-V3, arXiv:2412.19437, section 3.3.2). This costs two accumulators
in registers instead of one, and a wait for the tensor cores at every step. Hence 128x128 tiles on 8
warps: on 4 warps the two accumulators spill, and so does 128x256 on 8.

One program per SM iterates over the tiles, in groups of 8 rows of tiles, so that programs that run
at the same time share operands in L2. If the target has TMA, operands are loaded through tensor
descriptors, and the loop over tiles is flattened into the loop over K: the first loads of the next
tile are in flight while this one is stored. (Not for weight gradients: their second vector of
scales leaves no registers for it, and their K is long.) Otherwise operands are loaded through
pointers with 64-bit offsets.

No autotuning: it takes minutes at start-up on every rank, and ranks may choose differently.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.quantization.transpose_triton import to_row_major

BLOCK_K = 128


@dataclass(frozen=True)
class Tile:
    """Rows and columns of the output that one program computes at a time."""

    rows: int
    columns: int
    warps: int
    programs_per_sm: int
    cost: float
    """Time of one tile on a busy SM, relative to the first of `TILES`."""


TILES = (
    Tile(rows=128, columns=128, warps=8, programs_per_sm=1, cost=1.0),
    # with two programs one's promotion overlaps the other's products, but they read 1.5 times as
    # much
    Tile(rows=64, columns=128, warps=4, programs_per_sm=2, cost=0.625),
)


@dataclass(frozen=True)
class Target:
    """Device properties that the launcher uses."""

    n_sm: int
    shared_bytes: int
    amd: bool
    descriptors: bool
    hopper: bool = False
    """Whether `kernels.gemm.gemm_fp8_gluon` runs on it."""

    @staticmethod
    def current() -> "Target":
        """The device on which Triton launches."""
        return _target_of(triton.runtime.driver.active.get_current_device())


@functools.cache
def _target_of(device: Any) -> Target:
    driver = triton.runtime.driver.active
    properties = driver.utils.get_device_properties(device)
    target = driver.get_current_target()
    amd = target.backend == "hip"
    return Target(
        n_sm=properties["multiprocessor_count"],
        shared_bytes=properties["max_shared_mem"],
        amd=amd,
        descriptors=not amd and target.arch // 10 in (9, 10),
        hopper=not amd and target.arch == 90,
    )


def gemm(
    a_MK: Tensor, scales_a_Mk: Tensor, b_NK: Tensor, scales_b: Tensor, c_MN: Tensor,
    target: Target | None = None, tile: Tile | None = None,
) -> None:  # fmt: skip
    """`c = a @ b.T`; scales_b is `[n, k]` or, a scale per row of b, `[N, k]`.

    Any strides are allowed; operands in a memory order that the tensor cores cannot read are copied
    first. No dimension may be 0.
    """
    (M, _), N = a_MK.shape, b_NK.shape[0]
    target = target or Target.current()
    tile = tile or choose_tile(M, N, target.n_sm)
    assert tile.columns == BLOCK_K, "one scale of b covers the columns of a tile"
    a_MK, b_NK = k_major(a_MK, target), k_major(b_NK, target)
    scale_per_row_of_b = N > 1 and scales_b.shape[0] == N
    scales_a_Mk = rows_contiguous(scales_a_Mk)
    if scale_per_row_of_b:
        scales_b = rows_contiguous(scales_b)
    a, b = (
        TensorDescriptor.from_tensor(x, [size, BLOCK_K]) if target.descriptors else x
        for x, size in ((a_MK, tile.rows), (b_NK, tile.columns))
    )
    n_tiles = triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns)
    _gemm[(min(n_tiles, target.n_sm * tile.programs_per_sm),)](
        a, scales_a_Mk, b, scales_b, c_MN, M, N, a_MK.shape[1], a_MK.stride(0), b_NK.stride(0),
        scales_a_Mk.stride(1), *scales_b.stride(), c_MN.stride(0),
        SCALE_PER_ROW_OF_B=scale_per_row_of_b,
        DESCRIPTORS=target.descriptors, BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=BLOCK_K,
        GROUP=8, num_warps=tile.warps, num_stages=stages(tile, target, c_MN.element_size()),
    )  # fmt: skip


def choose_tile(M: int, N: int, n_sm: int) -> Tile:
    """The tile with the least time: tiles of the fullest SM x cost. This is a prediction from
    reads: the small tile reads 1.5 times as much for each product, which is assumed to cost 1.25
    times as much through L2; it is faster if large tiles would leave most SMs idle in the last
    round."""

    def time(tile: Tile) -> float:
        n_tiles = triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns)
        return float(triton.cdiv(n_tiles, n_sm) * tile.cost)

    return min(TILES, key=time)


def stages(tile: Tile, target: Target, element_size: int) -> int:
    """Loads in flight, each of `BLOCK_K` bytes of a tile's rows and columns: at most 4, and as many
    as fit into shared memory with the output tile. AMD keeps the second stage in registers."""
    if target.amd:
        return 2
    free = target.shared_bytes // tile.programs_per_sm - tile.rows * tile.columns * element_size
    return max(min(4, free // ((tile.rows + tile.columns) * BLOCK_K)), 1)


def k_major(x_RK: Tensor, target: Target) -> Tensor:
    """x, or a copy with contiguous rows whose address and stride are multiples of 16 bytes, as TMA
    and wide loads require. Without TMA, which fills with zeros beyond the end, K is a multiple of
    16 too."""
    R, K = x_RK.shape
    aligned = x_RK.stride(1) == 1 and x_RK.stride(0) % 16 == 0 and x_RK.data_ptr() % 16 == 0
    if aligned and (target.descriptors or K % 16 == 0):
        return x_RK
    if x_RK.stride(0) == 1 and x_RK.stride(1) != 1:
        return to_row_major(x_RK[None])[0]
    padded = torch.zeros(R, triton.cdiv(K, 16) * 16, dtype=torch.uint8, device=x_RK.device)
    padded[:, :K] = x_RK.view(torch.uint8)
    return padded.view(x_RK.dtype)


def rows_contiguous(scales_Rk: Tensor) -> Tensor:
    """Scales with contiguous rows, as `kernels.quantization.quantize` stores them."""
    return scales_Rk if scales_Rk.stride(0) == 1 else scales_Rk.T.contiguous().T


@triton.jit
def _gemm(  # type: ignore[no-untyped-def]
    a, scales_a_ptr, b, scales_b_ptr, c_ptr, M, N, K, a_stride_m, b_stride_n,
    scales_a_stride_k, scales_b_stride_n, scales_b_stride_k, c_stride_m,
    SCALE_PER_ROW_OF_B: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    FLATTEN: tl.constexpr = DESCRIPTORS and not SCALE_PER_ROW_OF_B
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        m, n = tile_at(tile, tiles_m, tiles_n, GROUP)
        row, column = m * BLOCK_M, n * BLOCK_N
        rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, tl.cdiv(K, BLOCK_K)):
            block_a = load(a, row, BLOCK_M, M, k, K, a_stride_m, DESCRIPTORS, BLOCK_K)
            block_b = load(b, column, BLOCK_N, N, k, K, b_stride_n, DESCRIPTORS, BLOCK_K)
            scales_a = scales_a_ptr + tl.cast(k, tl.int64) * scales_a_stride_k
            scales_b = scales_b_ptr + tl.cast(k, tl.int64) * scales_b_stride_k
            scale_a = tl.load(scales_a + rows, mask=rows < M, other=0.0)
            product = tl.dot(block_a, block_b.T)
            if SCALE_PER_ROW_OF_B:
                scale_b = tl.load(scales_b + columns, mask=columns < N, other=0.0)
                total += product * scale_a[:, None] * scale_b[None, :]
            else:
                scale = scale_a * tl.load(scales_b + column // 128 * scales_b_stride_n)
                total += product * scale[:, None]
        store(c_ptr, total, row, column, M, N, c_stride_m)


@triton.jit
def tile_at(tile, tiles_m, tiles_n, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row and column of a tile, in tiles: groups of GROUP rows of tiles, in a group column by
    column."""
    first_m = tile // (GROUP * tiles_n) * GROUP
    group = tl.minimum(tiles_m - first_m, GROUP)
    within = tile % (GROUP * tiles_n)
    return first_m + within % group, within // group


@triton.jit
def load(  # type: ignore[no-untyped-def]
    x, row, BLOCK_R: tl.constexpr, R, k, K, stride_r,
    DESCRIPTORS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows of step k of an operand, zero outside it."""
    if DESCRIPTORS:
        block = x.load([row, k * BLOCK_K])
    else:
        rows = row + tl.arange(0, BLOCK_R).to(tl.int64)
        along = k * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (rows < R)[:, None] & (along < K)[None, :]
        block = tl.load(x + rows[:, None] * stride_r + along[None, :], mask=inside, other=0.0)
    return block


@triton.jit
def store(c_ptr, total, row, column, M, N, stride_m):  # type: ignore[no-untyped-def]
    rows = row + tl.arange(0, total.shape[0]).to(tl.int64)
    columns = column + tl.arange(0, total.shape[1])
    at = c_ptr + rows[:, None] * stride_m + columns[None, :]
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(at, total.to(c_ptr.dtype.element_ty), mask=inside)

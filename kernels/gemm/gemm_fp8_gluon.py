"""Gluon form of `kernels.gemm.gemm_fp8` for Hopper, with warp specialization. Not measured.

In the plain Triton kernel all warps do the same work, so the tensor cores idle while partial
products are promoted to fp32. Here one warp of a program loads operands through TMA into a ring of
slots in shared memory, and two groups of 4 warps each compute half of the rows of a tile. The
groups do not wait for each other: one promotes while the products of the other run, and a group
that has finished a tile continues while the other stores. This is the structure of DeepGEMM.

A slot has two barriers: `ready` completes when its bytes have arrived, `empty` when both groups
have read it. The n-th use of a barrier completes its n-th phase, and a wait identifies the phase by
its parity. There is no other synchronization between the loader and the groups.

Not implemented: 256x128 tiles (two accumulators and a product in each thread spill), operands
shared between neighboring SMs (multicast), results stored through TMA, Blackwell.

Gluon requires an explicit layout for every tensor, and its interface changes between versions of
Triton: this file supports 3.6 to 3.9. Sizes and scales are as in `kernels.gemm.gemm_fp8_triton`.
"""

from typing import Any

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.gemm.gemm_fp8_triton import Target, k_major, rows_contiguous

BLOCK = 128
"""Rows and columns of a tile, and the length along K of a slot."""
SLOTS = 6
"""Steps of K in flight: as many as fit into shared memory with 16 KiB for an output tile."""
GROUP = 8
"""Rows of tiles that are processed together."""
_REGISTERS = (232, 24)
"""Registers per thread of the second group and of the loader; the first group has the other 248."""

# Triton 3.9 has renamed it
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


def gemm(
    a_MK: Tensor, scales_a_Mk: Tensor, b_NK: Tensor, scales_b: Tensor, c_MN: Tensor,
    target: Target | None = None,
) -> None:  # fmt: skip
    """As `kernels.gemm.gemm_fp8_triton.gemm`. Raises ValueError on anything but Hopper."""
    target = target or Target.current()
    if not target.hopper:
        raise ValueError("implementation 'gluon' needs a Hopper GPU (compute capability 9.0)")
    (M, _), N = a_MK.shape, b_NK.shape[0]
    a_MK, b_NK = k_major(a_MK, target), k_major(b_NK, target)
    scale_per_row_of_b = N > 1 and scales_b.shape[0] == N
    scales_a_Mk = rows_contiguous(scales_a_Mk)
    if scale_per_row_of_b:
        scales_b = rows_contiguous(scales_b)
    n_tiles = triton.cdiv(M, BLOCK) * triton.cdiv(N, BLOCK)
    _gemm[(min(n_tiles, target.n_sm),)](
        _descriptor(a_MK), scales_a_Mk, _descriptor(b_NK), scales_b, c_MN, M, N, a_MK.shape[1],
        scales_a_Mk.stride(1), *scales_b.stride(), c_MN.stride(0),
        SCALE_PER_ROW_OF_B=scale_per_row_of_b,
        SLOTS=SLOTS, BLOCK=BLOCK, GROUP=GROUP,
        GROUP_REGISTERS=_REGISTERS[0], LOADER_REGISTERS=_REGISTERS[1], num_warps=4,
    )  # fmt: skip


def _descriptor(x_RK: Tensor) -> Any:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    return TensorDescriptor.from_tensor(x_RK, [BLOCK, BLOCK], layout)


@gluon.jit
def _gemm(  # type: ignore[no-untyped-def]
    a, scales_a_ptr, b, scales_b_ptr, c_ptr, M, N, K,
    scales_a_stride_k, scales_b_stride_n, scales_b_stride_k, c_stride_m,
    SCALE_PER_ROW_OF_B: gl.constexpr, SLOTS: gl.constexpr,
    BLOCK: gl.constexpr, GROUP: gl.constexpr,
    GROUP_REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,
):  # fmt: skip
    slots_a = gl.allocate_shared_memory(a.dtype, [SLOTS, BLOCK, BLOCK], a.layout)
    slots_b = gl.allocate_shared_memory(b.dtype, [SLOTS, BLOCK, BLOCK], b.layout)
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    ring = (slots_a, slots_b, ready, empty)
    scales = (scales_a_ptr, scales_b_ptr, scales_a_stride_k, scales_b_stride_n, scales_b_stride_k)
    gl.warp_specialize(
        [
            (_multiply, (0, ring, scales, c_ptr, c_stride_m, M, N, K,
                         SCALE_PER_ROW_OF_B, SLOTS, BLOCK, GROUP)),
            (_multiply, (1, ring, scales, c_ptr, c_stride_m, M, N, K,
                         SCALE_PER_ROW_OF_B, SLOTS, BLOCK, GROUP)),
            (_fill, (a, b, ring, M, N, K, SLOTS, BLOCK, GROUP)),
        ],
        [4, 1], [GROUP_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip


@gluon.jit
def _corner(tile, M, N, BLOCK: gl.constexpr, GROUP: gl.constexpr):  # type: ignore[no-untyped-def]
    """First row and column of a tile; the order is that of `kernels.gemm.gemm_fp8_triton`."""
    tiles_m, tiles_n = (M + BLOCK - 1) // BLOCK, (N + BLOCK - 1) // BLOCK
    first_m = tile // (GROUP * tiles_n) * GROUP
    group = min(tiles_m - first_m, GROUP)
    within = tile % (GROUP * tiles_n)
    return (first_m + within % group) * BLOCK, within // group * BLOCK


@gluon.jit
def _fill(a, b, ring, M, N, K, SLOTS: gl.constexpr, BLOCK: gl.constexpr, GROUP: gl.constexpr):  # type: ignore[no-untyped-def]
    """The loader. `used` counts steps over all tiles, from which a slot's phase follows."""
    slots_a, slots_b, ready, empty = ring
    n_tiles = gl.cdiv(M, BLOCK) * gl.cdiv(N, BLOCK)
    used = 0
    for tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        row, column = _corner(tile, M, N, BLOCK, GROUP)
        for k in range(0, K, BLOCK):
            slot = used % SLOTS
            # the phase before the first counts as complete: the first round does not wait
            mbarrier.wait(empty.index(slot), ((used // SLOTS) & 1) ^ 1)
            mbarrier.expect(ready.index(slot), 2 * BLOCK * BLOCK)  # also outside the matrix
            _load(a, [row, k], ready.index(slot), slots_a.index(slot))
            _load(b, [column, k], ready.index(slot), slots_b.index(slot))
            used += 1


@gluon.jit
def _multiply(  # type: ignore[no-untyped-def]
    HALF: gl.constexpr, ring, scales, c_ptr, c_stride_m, M, N, K,
    SCALE_PER_ROW_OF_B: gl.constexpr, SLOTS: gl.constexpr,
    BLOCK: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """A group of 4 warps: upper (0) or lower (1) half of the rows of every tile."""
    slots_a, slots_b, ready, empty = ring
    scales_a_ptr, scales_b_ptr, scales_a_stride_k, scales_b_stride_n, scales_b_stride_k = scales
    HEIGHT: gl.constexpr = BLOCK // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 32]
    )
    n_tiles = gl.cdiv(M, BLOCK) * gl.cdiv(N, BLOCK)
    used = 0
    for tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        row, column = _corner(tile, M, N, BLOCK, GROUP)
        row += HALF * HEIGHT
        rows = row + gl.arange(0, HEIGHT, layout=gl.SliceLayout(1, layout))
        columns = column + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))
        scales_a, scales_b = scales_a_ptr + rows, scales_b_ptr + column // 128 * scales_b_stride_n
        if SCALE_PER_ROW_OF_B:
            scales_b = scales_b_ptr + columns
        total = gl.zeros((HEIGHT, BLOCK), gl.float32, layout)
        for _ in range(0, K, BLOCK):
            slot = used % SLOTS
            # in flight during the wait for the operands and the product
            scale_a = gl.load(scales_a, mask=rows < M, other=0.0)
            if SCALE_PER_ROW_OF_B:
                scale_b = gl.load(scales_b, mask=columns < N, other=0.0)
            else:
                scale_a *= gl.load(scales_b)
            mbarrier.wait(ready.index(slot), (used // SLOTS) & 1)
            half_a = slots_a.index(slot).slice(HALF * HEIGHT, HEIGHT)
            product = warpgroup_mma(
                half_a, slots_b.index(slot).permute((1, 0)),
                gl.zeros((HEIGHT, BLOCK), gl.float32, layout), use_acc=False, is_async=True,
            )  # fmt: skip
            product = warpgroup_mma_wait(0, deps=(product,))
            mbarrier.arrive(empty.index(slot), count=1)
            product *= gl.expand_dims(scale_a, 1)
            if SCALE_PER_ROW_OF_B:
                product *= gl.expand_dims(scale_b, 0)
            total += product
            scales_a += scales_a_stride_k
            scales_b += scales_b_stride_k
            used += 1
        _store(c_ptr, total, row, column, M, N, c_stride_m, HEIGHT, BLOCK)


@gluon.jit
def _store(  # type: ignore[no-untyped-def]
    c_ptr, total, row, column, M, N, stride_m,
    HEIGHT: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """Convert to whole rows per warp first: the layout of products has 2 elements per thread."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    total = gl.convert_layout(total.to(c_ptr.dtype.element_ty), layout)
    rows = row + gl.arange(0, HEIGHT, layout=gl.SliceLayout(1, layout))
    columns = column + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    at = c_ptr + gl.expand_dims(rows.to(gl.int64) * stride_m, 1) + gl.expand_dims(columns, 0)
    inside = gl.expand_dims(rows < M, 1) & gl.expand_dims(columns < N, 0)
    gl.store(at, total, mask=inside)

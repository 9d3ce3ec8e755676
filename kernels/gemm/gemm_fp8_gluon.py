"""Gluon form of the FP8 products for Hopper, dense and grouped, with warp specialization. Not
measured.

In the plain Triton kernels all warps do the same work, so the tensor cores idle while partial
products are promoted to fp32. Here one warp of a program loads operands through TMA into a ring of
slots in shared memory, and two groups of 4 warps each compute half of the rows of a tile. The
groups do not wait for each other: one promotes while the products of the other run, and a group
that has finished a tile continues while the other stores.

A tile has 256 or 128 rows and 128 columns. A group computes its 128 rows as two *waves* of 64,
which share the registers of one partial product (64 per thread, and 2 x 64 for results), as
DeepGEMM does: 256 rows read a quarter less from L2 per product than 128. The compiler must not move
a wave's promotion behind the products of the next, or two partial products live at once and spill;
`_keep` and the second wave's wait for the same slot prevent it.

No step waits for memory other than its slot, in which the scales of both operands arrive too.

A slot has two barriers: `ready` completes when its bytes have arrived, `empty` when both groups
have read it. The n-th use of a barrier completes its n-th phase, and a wait identifies the phase by
its parity. There is no other synchronization between the loader and the groups.

Not implemented: operands shared between neighboring SMs (multicast; Gluon has it from Triton 3.7
on), results stored through TMA (it would overwrite rows of the next expert), Blackwell.

Gluon requires an explicit layout for every tensor, and its interface changes between versions of
Triton: this file supports 3.6 to 3.9. Sizes and scales are as in `kernels.gemm.gemm_fp8_triton`.
"""

from typing import Any

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.gemm.gemm_fp8_triton import Target, k_major, rows_contiguous

BLOCK = 128
"""Columns of a tile, and the length along K of a slot."""
SLOTS = {128: 6, 256: 4}
"""Steps of K in flight, by rows of a tile: as many as fit into shared memory with the buffer that
turns an output tile."""
GROUP = 8
"""Rows of tiles that are processed together."""
_ONE_SCALE = 32
"""Scales that TMA reads where one is needed: 128 bytes, to which it aligns a slot."""
_REGISTERS = (240, 24)
"""Registers per thread of a group that multiplies and of the loader."""
_COST = {128: 1.0, 256: 1.5}
"""Relative time of a tile, by its rows: the bytes that it reads from L2."""
_MATRIX, _ROWS, _EXPERTS = 0, 1, 2
"""What the tiles belong to: one matrix, groups of rows, or the matrices of experts."""

# Triton 3.9 has renamed it
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


def gemm(
    a_MK: Tensor, scales_a_Mk: Tensor, b_NK: Tensor, scales_b: Tensor, c_MN: Tensor,
    target: Target | None = None, rows: int | None = None,
) -> None:  # fmt: skip
    """As `kernels.gemm.gemm_fp8_triton.gemm`. Raises ValueError on anything but Hopper.

    rows: of a tile; None chooses.
    """
    target = hopper(target)
    (M, K), N = a_MK.shape, b_NK.shape[0]
    a_MK, b_NK = k_major(a_MK, target), k_major(b_NK, target)
    scale_per_row_of_b = N > 1 and scales_b.shape[0] == N
    scales_a_Mk = rows_contiguous(scales_a_Mk)
    strides_b = scales_b.stride()
    if scale_per_row_of_b:
        scales_b = rows_contiguous(scales_b)
        strides_b = (0, scales_b.stride(1))
    rows = rows or choose_rows(triton.cdiv(M, 128), 0, N, target.n_sm)
    n_tiles = triton.cdiv(M, rows) * triton.cdiv(N, BLOCK)
    launch(
        (a_MK, b_NK), (scales_a_Mk, scales_b), (scales_a_Mk.stride(1), 0, *strides_b), c_MN,
        (M, N, K), (None,) * 4, n_tiles, _MATRIX, scale_per_row_of_b, rows, target,
    )  # fmt: skip


def hopper(target: Target | None) -> Target:
    """The device on which Triton launches. Raises ValueError on anything but Hopper."""
    target = target or Target.current()
    if not target.hopper:
        raise ValueError("implementation 'gluon' needs a Hopper GPU (compute capability 9.0)")
    return target


def choose_rows(blocks_m: float, n_experts: int, N: int, n_sm: int) -> int:
    """Rows of a tile, with the least predicted time. blocks_m: rows of the output, in 128; groups
    of rows waste half a tile each."""

    def time(rows: int) -> float:
        tiles_m = triton.cdiv(int(blocks_m), rows // 128) + n_experts / 2
        return float(triton.cdiv(int(tiles_m * triton.cdiv(N, BLOCK)), n_sm) * _COST[rows])

    return min(_COST, key=time)


def launch(
    operands: tuple[Tensor, Tensor], scales: tuple[Tensor, Tensor], strides: tuple[int, ...],
    c: Tensor, sizes: tuple[int, int, int], groups: tuple[Tensor | None, ...], n_tiles: int,
    kind: int, scale_per_row_of_b: bool, rows: int, target: Target,
) -> None:  # fmt: skip
    """Launch the kernel.

    operands: both with contiguous rows along K. strides: of the scales, a's along K, b's along
    experts, columns and K. groups: the list of tiles, ends, counts, and blocks before each group,
    as far as `kind` uses them. n_tiles: at most.
    """
    a, b = operands
    _gemm[(min(n_tiles, target.n_sm),)](
        _descriptor(a, rows), _vector(scales[0], rows), _descriptor(b, BLOCK),
        _vector(scales[1], BLOCK if scale_per_row_of_b else _ONE_SCALE), c,
        *groups, *sizes, *strides, c.stride(-2), n_tiles,
        KIND=kind, VECTOR_B=scale_per_row_of_b,
        SLOTS=SLOTS[rows], ROWS=rows, BLOCK=BLOCK, GROUP=GROUP, ENTRY=4,
        REGISTERS=_REGISTERS[0], LOADER_REGISTERS=_REGISTERS[1], num_warps=4,
    )  # fmt: skip


def _descriptor(x_RK: Tensor, rows: int) -> Any:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    return TensorDescriptor.from_tensor(x_RK, [rows, BLOCK], layout)


def _vector(scales: Tensor, length: int) -> Any:
    """Scales as one row of memory, of which TMA reads `length` from any place on: so no stride has
    to be a multiple of 16 bytes. Values beyond a column are those of the next; they belong to
    outputs that are not stored."""
    size = sum((n - 1) * stride for n, stride in zip(scales.shape, scales.stride(), strict=True))
    assert size < 2**31, "TMA's coordinates have 32 bits"
    flat = scales.as_strided((size + 1,), (1,))
    if flat.data_ptr() % 16:
        flat = flat.clone()
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    return TensorDescriptor.from_tensor(flat, [length], layout)


# integers equal to 1 would be compiled into the code, for which the partitions have no type
_SIZES = [
    "M", "N", "K", "stride_a", "stride_b_e", "stride_b_n", "stride_b_k", "c_stride", "n_tiles",
]  # fmt: skip


@gluon.jit(do_not_specialize=_SIZES[:-2] + _SIZES[-1:])
def _gemm(  # type: ignore[no-untyped-def]
    a, scales_a, b, scales_b, c_ptr, tiles_ptr, ends_ptr, counts_ptr, blocks_ptr,
    M, N, K, stride_a, stride_b_e, stride_b_n, stride_b_k, c_stride, n_tiles,
    KIND: gl.constexpr, VECTOR_B: gl.constexpr, SLOTS: gl.constexpr, ROWS: gl.constexpr,
    BLOCK: gl.constexpr, GROUP: gl.constexpr, ENTRY: gl.constexpr,
    REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,
):  # fmt: skip
    slots_a = gl.allocate_shared_memory(a.dtype, [SLOTS, ROWS, BLOCK], a.layout)
    slots_b = gl.allocate_shared_memory(b.dtype, [SLOTS, BLOCK, BLOCK], b.layout)
    scale_slots_a = gl.allocate_shared_memory(gl.float32, [SLOTS, ROWS], scales_a.layout)
    SCALES_B: gl.constexpr = scales_b.block_shape[0]
    scale_slots_b = gl.allocate_shared_memory(gl.float32, [SLOTS, SCALES_B], scales_b.layout)
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    fence_async_shared()
    ring = (slots_a, slots_b, scale_slots_a, scale_slots_b, ready, empty)
    problem = (M, N, K, tiles_ptr, ends_ptr, counts_ptr, blocks_ptr, n_tiles)
    output = (c_ptr, c_stride)
    strides = (stride_a, stride_b_e, stride_b_n, stride_b_k)
    gl.warp_specialize(
        [
            (_multiply, (0, ring, problem, output, KIND, VECTOR_B, SLOTS, ROWS, BLOCK, GROUP,
                         ENTRY)),
            (_multiply, (1, ring, problem, output, KIND, VECTOR_B, SLOTS, ROWS, BLOCK, GROUP,
                         ENTRY)),
            (_fill, (a, scales_a, b, scales_b, ring, problem, strides,
                     KIND, VECTOR_B, SLOTS, ROWS, BLOCK, GROUP, ENTRY)),
        ],
        [4, 1], [REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip


@gluon.jit
def _count(problem, KIND: gl.constexpr, BLOCK: gl.constexpr):  # type: ignore[no-untyped-def]
    """Number of tiles that are multiplied."""
    _, N, _, tiles_ptr, _, _, _, n_tiles = problem
    if KIND == 1:
        n_tiles = gl.load(tiles_ptr) * ((N + BLOCK - 1) // BLOCK)
    return n_tiles


@gluon.jit
def _tile(  # type: ignore[no-untyped-def]
    index, problem, KIND: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr,
    GROUP: gl.constexpr, ENTRY: gl.constexpr,
):  # fmt: skip
    """Of one tile: expert, first row of a, first column; start along K, steps, first block of
    scales; first row of c, end of the true rows and of the rows that are written.

    The order is that of `kernels.gemm.gemm_fp8_triton`.
    """
    M, N, K, tiles_ptr, ends_ptr, counts_ptr, blocks_ptr, _ = problem
    tiles_m, tiles_n = (M + ROWS - 1) // ROWS, (N + BLOCK - 1) // BLOCK
    expert, start, block = 0, 0, 0
    if KIND == 1:
        tiles_m = gl.load(tiles_ptr)
    if KIND == 2:
        expert = index // (tiles_m * tiles_n)
        index = index % (tiles_m * tiles_n)
    first_m = index // (GROUP * tiles_n) * GROUP
    group = min(tiles_m - first_m, GROUP)
    within = index % (GROUP * tiles_n)
    m, column = first_m + within % group, within // group * BLOCK
    row, end, length = m * ROWS, M, K
    written = end
    row_c = row
    if KIND == 1:
        entry = tiles_ptr + (1 + m) * ENTRY
        expert, row = gl.load(entry), gl.load(entry + 1)
        end, written = gl.load(entry + 2), gl.load(entry + 3)
        row_c = row
    if KIND == 2:
        if expert > 0:
            start = gl.load(ends_ptr + (expert - 1)).to(gl.int32)
        length = gl.load(counts_ptr + expert).to(gl.int32)
        block = gl.load(blocks_ptr + expert).to(gl.int32)
        row_c, end = expert * M + row, expert * M + M
        written = end
    return expert, row, column, start, (length + BLOCK - 1) // BLOCK, block, row_c, end, written


@gluon.jit
def _fill(  # type: ignore[no-untyped-def]
    a, scales_a, b, scales_b, ring, problem, strides,
    KIND: gl.constexpr, VECTOR_B: gl.constexpr, SLOTS: gl.constexpr, ROWS: gl.constexpr,
    BLOCK: gl.constexpr, GROUP: gl.constexpr, ENTRY: gl.constexpr,
):  # fmt: skip
    """The loader. `used` counts steps over all tiles, from which a slot's phase follows."""
    slots_a, slots_b, scale_slots_a, scale_slots_b, ready, empty = ring
    stride_a, stride_b_e, stride_b_n, stride_b_k = strides
    N = problem[1]
    BYTES: gl.constexpr = (ROWS + BLOCK) * BLOCK + 4 * (ROWS + scales_b.block_shape[0])
    used = 0
    for index in range(gl.program_id(0), _count(problem, KIND, BLOCK), gl.num_programs(0)):
        expert, row, column, start, steps, block, _, _, _ = _tile(
            index, problem, KIND, ROWS, BLOCK, GROUP, ENTRY
        )
        row_b = column
        if KIND == 1:
            row_b = expert * N + column  # the weights of all experts, one below the other
        at_b = expert * stride_b_e + column // 128 * stride_b_n
        if VECTOR_B:
            at_b = column
        for step in range(0, steps):
            slot = used % SLOTS
            # the phase before the first counts as complete: the first round does not wait
            mbarrier.wait(empty.index(slot), ((used // SLOTS) & 1) ^ 1)
            mbarrier.expect(ready.index(slot), BYTES)  # also outside the matrix
            k = start + step * BLOCK
            _load(a, [row, k], ready.index(slot), slots_a.index(slot))
            _load(b, [row_b, k], ready.index(slot), slots_b.index(slot))
            at_a = (block + step) * stride_a + row
            _load(scales_a, [at_a], ready.index(slot), scale_slots_a.index(slot))
            at = (block + step) * stride_b_k + at_b
            _load(scales_b, [at], ready.index(slot), scale_slots_b.index(slot))
            used += 1


@gluon.jit
def _multiply(  # type: ignore[no-untyped-def]
    HALF: gl.constexpr, ring, problem, output,
    KIND: gl.constexpr, VECTOR_B: gl.constexpr, SLOTS: gl.constexpr, ROWS: gl.constexpr,
    BLOCK: gl.constexpr, GROUP: gl.constexpr, ENTRY: gl.constexpr,
):  # fmt: skip
    """A group of 4 warps: upper (0) or lower (1) half of the rows of every tile."""
    empty = ring[5]
    c_ptr, c_stride = output
    WAVE: gl.constexpr = 64
    FIRST: gl.constexpr = HALF * (ROWS // 2)
    TWO_WAVES: gl.constexpr = ROWS == 4 * WAVE
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 32]
    )
    used = 0
    for index in range(gl.program_id(0), _count(problem, KIND, BLOCK), gl.num_programs(0)):
        _, _, column, _, steps, _, row, end, written = _tile(
            index, problem, KIND, ROWS, BLOCK, GROUP, ENTRY
        )
        total = gl.zeros((WAVE, BLOCK), gl.float32, layout)
        lower = gl.zeros((WAVE, BLOCK), gl.float32, layout)
        for _ in range(0, steps):
            slot, parity = used % SLOTS, (used // SLOTS) & 1
            product, scale_a, scale_b = _wave(
                FIRST, slot, parity, ring, WAVE, BLOCK, VECTOR_B, layout
            )
            if not TWO_WAVES:
                mbarrier.arrive(empty.index(slot), count=1)
            total = _keep(_promoted(total, product, scale_a, scale_b, VECTOR_B))
            if TWO_WAVES:
                product, scale_a, scale_b = _wave(
                    FIRST + WAVE, slot, parity, ring, WAVE, BLOCK, VECTOR_B, layout
                )
                mbarrier.arrive(empty.index(slot), count=1)
                lower = _promoted(lower, product, scale_a, scale_b, VECTOR_B)
            used += 1
        _store(c_ptr, total, row + FIRST, column, end, written, problem[1], c_stride, KIND)
        if TWO_WAVES:
            row = row + (FIRST + WAVE)
            _store(c_ptr, lower, row, column, end, written, problem[1], c_stride, KIND)
    if KIND == 1:
        _store_zeros(FIRST, problem, c_ptr, c_stride, WAVE, TWO_WAVES, BLOCK, ENTRY, layout)


@gluon.jit
def _wave(  # type: ignore[no-untyped-def]
    first, slot, parity, ring, WAVE: gl.constexpr, BLOCK: gl.constexpr, VECTOR_B: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """Products of `WAVE` rows of a slot from row `first` on, and the scales of both operands."""
    slots_a, slots_b, scale_slots_a, scale_slots_b, ready, _ = ring
    mbarrier.wait(ready.index(slot), parity)
    product = warpgroup_mma(
        slots_a.index(slot).slice(first, WAVE), slots_b.index(slot).permute((1, 0)),
        gl.zeros((WAVE, BLOCK), gl.float32, layout), use_acc=False, is_async=True,
    )  # fmt: skip
    product = warpgroup_mma_wait(0, deps=(product,))
    scale_a = scale_slots_a.index(slot).slice(first, WAVE).load(gl.SliceLayout(1, layout))
    if VECTOR_B:
        scale_b = scale_slots_b.index(slot).load(gl.SliceLayout(0, layout))
    else:
        scale_b = scale_slots_b.index(slot).slice(0, 1).load(gl.SliceLayout(1, layout))

    return product, scale_a, scale_b


@gluon.jit
def _promoted(total, product, scale_a, scale_b, VECTOR_B: gl.constexpr):  # type: ignore[no-untyped-def]
    if VECTOR_B:
        total += product * gl.expand_dims(scale_a, 1) * gl.expand_dims(scale_b, 0)
    else:
        total += product * gl.expand_dims(scale_a * scale_b, 1)
    return total


@gluon.jit
def _keep(x):  # type: ignore[no-untyped-def]
    """x, which the compiler computes before all later operations with side effects."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def _store_zeros(  # type: ignore[no-untyped-def]
    FIRST: gl.constexpr, problem, c_ptr, c_stride, WAVE: gl.constexpr, TWO_WAVES: gl.constexpr,
    BLOCK: gl.constexpr, ENTRY: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Tiles without true rows, at the end of the list."""
    N, tiles_ptr = problem[1], problem[3]
    tiles_n = (N + BLOCK - 1) // BLOCK
    n_zero = gl.load(tiles_ptr + 1) * tiles_n
    zeros = gl.zeros((WAVE, BLOCK), gl.float32, layout)
    for index in range(gl.program_id(0), n_zero, gl.num_programs(0)):
        entry = tiles_ptr + (1 + gl.load(tiles_ptr) + index // tiles_n) * ENTRY
        row, written = gl.load(entry + 1) + FIRST, gl.load(entry + 3)
        column = index % tiles_n * BLOCK
        _store(c_ptr, zeros, row, column, written, written, N, c_stride, 0)
        if TWO_WAVES:
            _store(c_ptr, zeros, row + WAVE, column, written, written, N, c_stride, 0)


@gluon.jit
def _store(c_ptr, total, row, column, end, written, N, c_stride, KIND: gl.constexpr):  # type: ignore[no-untyped-def]
    """Store rows before `written`, those from `end` on as zeros. Convert to whole rows per warp
    first: the layout of products has 2 elements per thread."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    total = gl.convert_layout(total.to(c_ptr.dtype.element_ty), layout)
    rows = row + gl.arange(0, total.shape[0], layout=gl.SliceLayout(1, layout))
    columns = column + gl.arange(0, total.shape[1], layout=gl.SliceLayout(0, layout))
    if KIND == 1:
        total = gl.where(gl.expand_dims(rows < end, 1), total, 0.0)
    at = c_ptr + gl.expand_dims(rows.to(gl.int64) * c_stride, 1) + gl.expand_dims(columns, 0)
    inside = gl.expand_dims(rows < written, 1) & gl.expand_dims(columns < N, 0)
    gl.store(at, total, mask=inside)

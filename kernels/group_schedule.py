"""Cuts groups of rows into tiles on the device.

Only the device knows the group sizes, and a host that reads them waits for it. So the list of
tiles has room for the maximum for R rows in E groups, `ceil(R / size) + E`, and the device
writes their number. There is one program per group: it counts the tiles of earlier groups itself,
which costs a load of all ends and requires no order among programs.

Shapes: E groups.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

ENTRY = 4
"""Numbers per tile: expert, first row, end of the true rows, end of the group."""


@dataclass(frozen=True)
class Schedule:
    """Output of `schedule`."""

    tiles: Tensor
    """int32 `[1 + n, 4]`: the numbers of tiles with and without true rows, then the tiles in
    this order; unused entries are 0."""
    first_E: Tensor
    """int32: tiles before each group, true or not."""

    @property
    def n_most(self) -> int:
        """Upper bound on the number of tiles for any groups."""
        return len(self.tiles) - 1


def schedule(ends_E: Tensor, counts_E: Tensor, n_rows: int, size: int, split: bool) -> Schedule:
    """Cut every group into tiles of `size` rows; `split` moves tiles without true rows to the
    end."""
    n_groups = len(ends_E)
    tiles = ends_E.new_zeros(1 + triton.cdiv(n_rows, size) + n_groups, ENTRY, dtype=torch.int32)
    first_E = ends_E.new_empty(n_groups, dtype=torch.int32)
    _schedule[(n_groups,)](
        ends_E, counts_E, tiles, first_E, n_groups,
        SIZE=size, SPLIT=split, ENTRY=ENTRY, CHUNK=128, num_warps=4,
    )  # fmt: skip
    return Schedule(tiles, first_E)


@triton.jit
def _schedule(  # type: ignore[no-untyped-def]
    ends_ptr, counts_ptr, tiles_ptr, first_ptr, n_groups,
    SIZE: tl.constexpr, SPLIT: tl.constexpr, ENTRY: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program e writes the tiles of group e and counts those of earlier groups itself."""
    expert = tl.program_id(0)
    true_before, before, true_in_all, in_all = 0, 0, 0, 0
    for first in range(0, n_groups, CHUNK):
        group = first + tl.arange(0, CHUNK)
        some = group < n_groups
        start = tl.load(ends_ptr + group - 1, mask=some & (group > 0), other=0)
        length = tl.load(ends_ptr + group, mask=some, other=0) - start
        n_all = tl.cdiv(length.to(tl.int32), SIZE)
        n_true = tl.cdiv(tl.load(counts_ptr + group, mask=some, other=0).to(tl.int32), SIZE)
        true_before += tl.sum(tl.where(group < expert, n_true, 0))
        before += tl.sum(tl.where(group < expert, n_all, 0))
        true_in_all += tl.sum(n_true)
        in_all += tl.sum(n_all)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0).to(tl.int32)
    end = tl.load(ends_ptr + expert).to(tl.int32)
    true_end = start + tl.load(counts_ptr + expert).to(tl.int32)
    n_true, n_tiles = tl.cdiv(true_end - start, SIZE), tl.cdiv(end - start, SIZE)
    tl.store(first_ptr + expert, before)
    if expert == 0:
        tl.store(tiles_ptr, true_in_all if SPLIT else in_all)
        tl.store(tiles_ptr + 1, in_all - true_in_all if SPLIT else 0)
    for first in range(0, n_tiles, CHUNK):
        local = first + tl.arange(0, CHUNK)
        place = before + local
        if SPLIT:
            zero_place = true_in_all + before - true_before + local - n_true
            place = tl.where(local < n_true, true_before + local, zero_place)
        at = tiles_ptr + (1 + place) * ENTRY
        tl.store(at, expert, mask=local < n_tiles)
        tl.store(at + 1, start + local * SIZE, mask=local < n_tiles)
        tl.store(at + 2, true_end, mask=local < n_tiles)
        tl.store(at + 3, end, mask=local < n_tiles)

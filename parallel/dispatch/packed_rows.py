"""Rows in the format in which they are sent, and the asynchronous all-to-all that sends them.

A row consists of its values and, in fp32, additional numbers: the scales of an FP8 row, a routing
weight. The latter are in one tensor, so that an exchange takes two messages, not four. FP8 halves
the bytes of bf16; each row is quantized separately, 128 values per scale (DeepSeek-V3,
arXiv:2412.19437, section 3.3.2), and is sent as bytes, since gloo does not support FP8.

R rows, D width, s scales per row.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.fp8 import fp8_dtype
from kernels.moe.permute import Permutation, combine_rows, gather_rows
from kernels.quantization.quantize import dequantize_1x128, quantize_1x128
from models.step_context import DispatchStats
from parallel.waiting import wait_tensor

WireFormat = Literal["compute", "fp8", "fp8_power_of_two"]
"""How values are sent: in the compute dtype, or in FP8, whose scales may be powers of two."""
_c10d = torch.ops._c10d_functional  # each returns a new tensor, which recomputation can keep


class PackedRows(NamedTuple):
    """Rows as they are sent."""

    data: Tensor
    """`[R, D]`: values in the compute dtype, or FP8 as uint8."""
    scales: Tensor | None
    """`[R, s]` where `data` is FP8."""
    extra: Tensor | None
    """`[R, any]`, fp32: other numbers of the rows."""

    def values(self, dtype: torch.dtype) -> Tensor:
        """The rows in `dtype`."""
        if self.scales is None:
            return self.data
        return dequantize_1x128(self.fp8(), self.scales, dtype)

    def fp8(self) -> Tensor:
        return self.data.view(fp8_dtype(self.data.device))

    def gathered(self, to: Permutation, extra: Tensor | None) -> "PackedRows":
        """The rows of these tokens in the slots of `to`; `extra` is already per row."""
        scales = None if self.scales is None else gather_rows(self.scales, to)
        return PackedRows(gather_rows(self.data, to), scales, extra)


def pack(x_RD: Tensor, wire: WireFormat, extra: Tensor | None = None) -> PackedRows:
    """Convert rows to the format `wire`."""
    if wire == "compute":
        return PackedRows(x_RD, None, extra)
    data, scales = quantize_1x128(x_RD, power_of_two=wire == "fp8_power_of_two")
    return PackedRows(data.view(torch.uint8), scales.contiguous(), extra)


def per_choice(values_TK: Tensor | None, to: Permutation) -> Tensor | None:
    """One value of every (token, choice) as a column `[P, 1]` in the slots of `to`."""
    return None if values_TK is None else gather_rows(values_TK.reshape(-1, 1), to)


def to_choices(column: Tensor | None, back: Permutation, top_k: int) -> Tensor | None:
    """The inverse of `per_choice`, `[T, K]`; zero for choices without a row."""
    return None if column is None else combine_rows(column, back, 1).view(-1, top_k)


@dataclass(frozen=True)
class RowAllToAll:
    """All-to-all of packed rows over a process group."""

    group: dist.ProcessGroup
    crosses: list[bool]
    """For every rank of the group, whether it is on another node."""

    @property
    def size(self) -> int:
        return len(self.crosses)

    def start(
        self, rows: PackedRows, sent: list[int] | None, got: list[int] | None, stats: DispatchStats
    ) -> "PendingRows":
        """Begin to exchange rows.

        sent, got: rows to and from every rank. None: the same number for each. stats: counts the
        bytes.
        """
        fp32 = [part for part in (rows.scales, rows.extra) if part is not None]
        data = self._start(rows.data, sent, got, stats)
        beside = self._start(torch.cat(fp32, 1), sent, got, stats) if fp32 else None
        n_scales = 0 if rows.scales is None else rows.scales.shape[1]
        return PendingRows(data, beside, n_scales, rows.extra is not None)

    def exchange_counts(self, counts_r: Tensor) -> Tensor:
        """The counts of every rank for this one; the first dimension is the rank. Not counted."""
        even = [1] * self.size
        got = _c10d.all_to_all_single(counts_r.contiguous(), even, even, self.group.group_name)
        arrived: Tensor = wait_tensor(got)
        return arrived

    def _start(
        self, rows: Tensor, sent: list[int] | None, got: list[int] | None, stats: DispatchStats
    ) -> Tensor:
        even = [len(rows) // self.size] * self.size
        out: Tensor = _c10d.all_to_all_single(
            rows.contiguous(), got or even, sent or even, self.group.group_name
        )
        self._count(rows, even if sent is None else sent, stats)
        return out

    def _count(self, rows: Tensor, sent: list[int], stats: DispatchStats) -> None:
        width = rows[:1].numel() * rows.element_size() if len(rows) else 0
        stats.bytes += width * (sum(sent) - sent[self.group.rank()])
        across = sum(n for n, far in zip(sent, self.crosses, strict=True) if far)
        stats.bytes_between_nodes += width * across


@dataclass(frozen=True)
class PendingRows:
    """Rows that are being sent."""

    data: Tensor
    fp32: Tensor | None
    """Scales and extra in one tensor, if there are any."""
    n_scales: int
    has_extra: bool

    def wait(self) -> PackedRows:
        """The received rows."""
        data = wait_tensor(self.data)
        if self.fp32 is None:
            return PackedRows(data, None, None)
        fp32 = wait_tensor(self.fp32)
        return PackedRows(
            data,
            fp32[:, : self.n_scales] if self.n_scales else None,
            fp32[:, self.n_scales :] if self.has_extra else None,
        )

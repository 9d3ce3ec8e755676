"""What travels, and how: rows in a wire format, through an asynchronous all-to-all.

A row is its values plus, in fp32, what belongs to it: the scales of an FP8 row, a routing weight.
The latter lie in one tensor, so that a row costs two messages, never four. FP8 halves the bytes of
bf16; each row is quantised on its own, 128 values per scale (DeepSeek-V3, arXiv:2412.19437, section
3.3.2), and travels as bytes, since gloo knows no FP8.

R rows, D width, s scales per row.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.fp8 import fp8_dtype
from kernels.moe.permute import Permutation, combine_rows, gather_rows
from kernels.quantization.quantize import dequantize_1x128, quantize_1x128

WireFormat = Literal["compute", "fp8", "fp8_power_of_two"]
"""How values travel: in the compute dtype, or in FP8, whose scales may be powers of two."""
_c10d = torch.ops._c10d_functional  # each gives a new tensor, which recomputation can keep


class PackedRows(NamedTuple):
    """Rows as they travel."""

    data: Tensor
    """`[R, D]`: values in the compute dtype, or FP8 as uint8."""
    scales: Tensor | None
    """`[R, s]` where `data` is FP8."""
    extra: Tensor | None
    """`[R, any]`, fp32: what else belongs to the rows."""

    def values(self, dtype: torch.dtype) -> Tensor:
        """The rows themselves."""
        if self.scales is None:
            return self.data
        return dequantize_1x128(self.fp8(), self.scales, dtype)

    def fp8(self) -> Tensor:
        return self.data.view(fp8_dtype(self.data.device))

    def gathered(self, to: Permutation, extra: Tensor | None) -> "PackedRows":
        """The rows of these tokens in the slots of `to`; `extra` is per row already."""
        scales = None if self.scales is None else gather_rows(self.scales, to)
        return PackedRows(gather_rows(self.data, to), scales, extra)


def pack(x_RD: Tensor, wire: WireFormat, extra: Tensor | None = None) -> PackedRows:
    """Rows in a wire format."""
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


@dataclass
class DispatchCounters:
    """What one MoE layer sent and received on this rank since the last `take`."""

    rows_sent: int | Tensor = 0
    """Rows (a token for one expert) whose expert is on another rank."""
    rows_received: int | Tensor = 0
    """Rows of this rank's experts."""
    bytes: int = 0
    """To other ranks, forward and backward, without the counts."""
    bytes_between_nodes: int = 0
    """The part of `bytes` to ranks of other nodes."""
    fullest: int | Tensor = 0
    """Most rows that one rank had for another in one exchange; kept where room is limited."""
    capacity: int = 0
    """Rows there was room for; 0: for any number."""
    lost: int | Tensor = 0
    """Rows that found no room."""

    def on_device(self, like: Tensor) -> None:
        """Go on counting on the device, where the exchange is not known to the host.

        Before the first number, not with it: selective recomputation repeats the operations of
        forward, and a sum of a tensor and an int is another than that of two tensors.
        """
        for name in ("rows_sent", "rows_received", "fullest", "lost"):
            total = getattr(self, name)
            if not isinstance(total, Tensor):
                setattr(self, name, like.new_full((), total))

    def take(self) -> "DispatchCounters":
        """The numbers so far; counting starts anew."""
        taken = replace(self)
        vars(self).update(vars(DispatchCounters()))
        return taken


@dataclass
class RowAllToAll:
    """A process group, with the account of what goes through it."""

    group: dist.ProcessGroup
    crosses: list[bool]
    """For every rank of the group, whether it is on another node."""
    traffic: DispatchCounters = field(default_factory=DispatchCounters)

    @property
    def size(self) -> int:
        return len(self.crosses)

    def start(
        self, parcel: PackedRows, sent: list[int] | None, got: list[int] | None
    ) -> Callable[[], PackedRows]:
        """Begin to exchange rows; the result waits for them.

        sent, got: rows to and from every rank. None: evenly many.
        """
        parts = [part for part in (parcel.scales, parcel.extra) if part is not None]
        waits = [self._start(parcel.data, sent, got)]
        if parts:
            waits.append(self._start(torch.cat(parts, 1), sent, got))
        n_scales = 0 if parcel.scales is None else parcel.scales.shape[1]

        def arrive() -> PackedRows:
            data, *rest = (wait() for wait in waits)
            scales = rest[0][:, :n_scales] if n_scales else None
            return PackedRows(
                data, scales, rest[0][:, n_scales:] if parcel.extra is not None else None
            )

        return arrive

    def exchange_counts(self, counts_r: Tensor) -> Tensor:
        """What every rank had for this one; the first dimension runs over ranks. Not counted."""
        even = [1] * self.size
        got = _c10d.all_to_all_single(counts_r.contiguous(), even, even, self.group.group_name)
        arrived: Tensor = _c10d.wait_tensor(got)
        return arrived

    def _start(
        self, rows: Tensor, sent: list[int] | None, got: list[int] | None
    ) -> Callable[[], Tensor]:
        even = [len(rows) // self.size] * self.size
        out = _c10d.all_to_all_single(
            rows.contiguous(), got or even, sent or even, self.group.group_name
        )
        self._count(rows, sent)
        return lambda: _c10d.wait_tensor(out)

    def _count(self, rows: Tensor, sent: list[int] | None) -> None:
        each = [len(rows) // self.size] * self.size if sent is None else sent
        width = rows[:1].numel() * rows.element_size() if len(rows) else 0
        me = self.group.rank()
        self.traffic.bytes += width * (sum(each) - each[me])
        across = sum(n for n, far in zip(each, self.crosses, strict=True) if far)
        self.traffic.bytes_between_nodes += width * across

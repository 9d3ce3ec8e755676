"""A box of a tensor: the part of it that a file, or a rank, has."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """A box in a tensor of shape `whole`."""

    whole: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    def slices(self) -> tuple[slice, ...]:
        """Index of the box in the whole tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.shape, strict=True))

    def intersect(self, other: "Box") -> "Box | None":
        """The common part of two boxes of the same tensor, or None if there is none."""
        offset = tuple(map(max, self.offset, other.offset))
        ends = [
            min(a + n, b + m)
            for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        ]
        shape = tuple(end - start for start, end in zip(offset, ends, strict=True))
        return Box(self.whole, offset, shape) if min(shape, default=1) > 0 else None

    def within(self, outer: "Box") -> tuple[slice, ...]:
        """Index of this box in a tensor that contains just `outer`."""
        return tuple(
            slice(o - p, o - p + n)
            for o, p, n in zip(self.offset, outer.offset, self.shape, strict=True)
        )

    def at(self, index: Sequence[int]) -> "Box | None":
        """This box in `tensor[index]`, one element of the leading dimensions; None if the box does
        not contain that element."""
        n = len(index)
        leading = zip(index, self.offset, self.shape, strict=False)
        if not all(o <= i < o + size for i, o, size in leading):
            return None
        return Box(self.whole[n:], self.offset[n:], self.shape[n:])

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @staticmethod
    def all_of(shape: Sequence[int]) -> "Box":
        """The whole tensor."""
        return Box(tuple(shape), (0,) * len(shape), tuple(shape))

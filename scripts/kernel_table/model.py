"""Speed of an FP8 product on an H200, predicted from its inner loop: not a measurement.

A step multiplies 128 of K for one tile of `rows` x `columns`. Its clocks are the largest of:

- tensor cores: `rows * columns * 128 / 4096`;
- issue slots: instructions per warp and step x warps per scheduler;
- L2: `(rows + columns) * 128 bytes / 32.4 bytes per clock and SM`;
- one group of warps alone, which cannot overlap with itself: for each of its waits the tensor
  clocks of its part, the instructions between that wait and the next product (times the warps of
  a scheduler that are in step with each other), and 80 clocks until the first result of a
  product can be read (plus 300 for a global load that it waits for).

A tile has its steps and, on top, the instructions outside the inner loop and 600 clocks for its
stores; half of that if another group of warps continues meanwhile. If loads run ahead into the next
tile, L2 works in this time too; otherwise another 600 clocks pass until the first operands arrive.
A product has `ceil(tiles / SMs)` rounds of tiles.

Constants: 132 SMs at 1,755 MHz, 4,096 FP8 multiplications per clock and SM; L2 at 7.5 TB/s, which
Triton's tutorial needs for its published 1,280 TFLOP/s at 3584^3 with 128x256 tiles and no
multicast. Not included: power limits, which lower the clock, and other reads of L2 and memory.
"""

import math
from dataclasses import dataclass, replace

from scripts.kernel_table.sass import Loop

SMS, CLOCK_HZ = 132, 1.755e9
_MULTIPLICATIONS = 4096
_L2_BYTES = 7.5e12 / SMS / CLOCK_HZ
_PRODUCT_CLOCKS, _LOAD_CLOCKS, _TILE_CLOCKS = 80, 300, 600
_STEP = 128
_SCHEDULERS = 4


@dataclass(frozen=True)
class Tiling:
    """How a kernel divides its output."""

    rows: int
    columns: int
    warps: int
    """Warps that multiply, in one program."""
    groups: int
    """Groups of these warps that run independently of each other."""
    ahead: bool = True
    """Whether the next tile's operands are loaded before this tile ends."""


@dataclass(frozen=True)
class Shape:
    """One product, or one for each of several experts with equal numbers of rows."""

    M: int
    N: int
    K: int
    experts: int = 1
    ragged: bool = False
    """Whether the rows of an expert end anywhere: half a tile per expert is wasted."""

    @property
    def name(self) -> str:
        """As in the table."""
        return f"{self.experts} x " * (self.experts > 1) + f"{self.M} x {self.N} x {self.K}"

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.M * self.N * self.K * self.experts


def per_step(loop: Loop, tiling: Tiling) -> Loop:
    """The loop's counts for whole steps, if each wave of 64 rows waits for the barrier again."""
    products = _STEP // 32 * tiling.rows * tiling.columns / (64 * 128 * tiling.warps / 4)
    factor = products / loop.products
    return replace(
        loop,
        steps=round(loop.steps / factor),
        instructions=loop.instructions * factor,
        products=products,
        waits=loop.waits * factor,
        promotion=loop.promotion * factor,
        fused=loop.fused * factor,
    )


def step_clocks(tiling: Tiling, loop: Loop) -> dict[str, float]:
    """Clocks of one step by limit."""
    elements = tiling.rows * tiling.columns
    tensor = elements * _STEP / _MULTIPLICATIONS
    together = tiling.warps / tiling.groups / _SCHEDULERS
    alone = (
        tensor / tiling.groups
        + loop.promotion * together
        + loop.waits * _PRODUCT_CLOCKS
        + (_LOAD_CLOCKS if loop.waited_loads else 0)
    )
    return {
        "tensor cores": tensor,
        "issue": loop.instructions * tiling.warps / _SCHEDULERS,
        "L2": (tiling.rows + tiling.columns) * _STEP / _L2_BYTES,
        "a group alone": alone,
    }


def predicted_tflops(shape: Shape, tiling: Tiling, loop: Loop) -> float:
    """TFLOP/s of a product on an H200, predicted."""
    clocks = step_clocks(tiling, loop)
    steps = math.ceil(shape.K / _STEP)
    together = tiling.warps / tiling.groups / _SCHEDULERS
    tile = (loop.per_tile * together + _TILE_CLOCKS) / (2 if tiling.groups > 1 else 1)
    busy = max(value for name, value in clocks.items() if name != "L2")
    if tiling.ahead:
        per_tile = max(steps * clocks["L2"], steps * busy + tile)
    else:
        per_tile = steps * max(clocks["L2"], busy) + tile + _TILE_CLOCKS
    rows = shape.M / tiling.rows
    rows = rows + 0.5 if shape.ragged else math.ceil(rows)
    tiles = shape.experts * rows * math.ceil(shape.N / tiling.columns)
    rounds = math.ceil(tiles / SMS)
    return shape.operations / (rounds * per_tile / CLOCK_HZ) / 1e12

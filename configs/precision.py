"""Number formats of a run's computation: the section [precision]."""

from dataclasses import dataclass, field
from typing import Literal

from configs.errors import ConfigError
from configs.rules import between


@dataclass(frozen=True, kw_only=True)
class FP8Config:
    keep: tuple[str, ...] = ()
    """Modules to leave in bf16: shell patterns of their names, for example `layers.0.*` or
    `*.attention.wo`. Every pattern must match a module. These are never quantized and need no
    pattern: embeddings, head, router, norms, biases and the attention between queries, keys and
    values."""
    power_of_two: bool = False
    """Round all scales up to powers of two (the MX format's scales), so that multiplying by them is
    exact. On a CPU with fast bf16 the emulated products are then four times as fast."""
    first_bf16: int = 0
    """Blocks at the beginning to leave in bf16."""
    last_bf16: int = 0
    """Blocks at the end to leave in bf16; MTP modules count as the last."""
    diagnose_every: int = 0
    """Steps between reports of the FP8 error of each layer: signal to noise of the three products,
    values flushed to zero or clipped to the largest, range of scales. 0: never."""
    warn_below_db: float = 15.0
    """A report warns of products with a lower signal-to-noise ratio. About 28 dB is usual; less
    means that a block spans a wider range than e4m3."""

    def __post_init__(self) -> None:
        between(self, 0, 10_016, "first_bf16", "last_bf16")
        between(self, 0, 2**31, "diagnose_every")
        between(self, -1000, 1000, "warn_below_db")
        if not self.diagnose_every and self.warn_below_db != FP8Config.warn_below_db:
            raise ConfigError(
                f"warn_below_db = {self.warn_below_db}: nothing is reported with "
                "diagnose_every = 0; set it to a number of steps"
            )


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    recipe: Literal["auto", "bf16", "fp32", "fp8_blockwise"] = "auto"
    """Compute dtype. Master weights are fp32, and so are gradients once they are summed over ranks.
    `auto`: bf16 if the device multiplies it faster than fp32 (CUDA; CPUs with AVX512-BF16 or AMX).
    `fp8_blockwise`: the products of projections and experts in FP8 with a scale per block
    (DeepSeek-V3), the rest as `auto`. A GPU without FP8 is an error; a CPU emulates the arithmetic
    exactly."""
    fp8: FP8Config = field(default_factory=FP8Config)
    """Details of `fp8_blockwise`."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the optimizer's two moments; bf16 saves 4 bytes per parameter."""

    def __post_init__(self) -> None:
        if self.recipe != "fp8_blockwise" and self.fp8 != FP8Config():
            raise ConfigError(
                f"fp8 is set, but recipe = {self.recipe!r} computes nothing in FP8; use "
                "recipe = 'fp8_blockwise'"
            )

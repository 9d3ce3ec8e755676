"""Settings of what a run does about hanging ranks, bad numbers and slow ranks."""

from dataclasses import dataclass

from configs.errors import ConfigError
from configs.rules import between


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    frozen_s: float = 15.0
    """A process that shows no sign of life for this many seconds is frozen, in any phase: its
    rank is named and the attempt ends. A process that uses CPU time is not frozen. 0: off."""
    hang_s: float = 20.0
    """Seconds without progress in a pass of a step or of validation (forward, backward, optimizer,
    data) after which the run hangs; at least 3 times the longest such pass of this attempt. The
    stacks of all ranks are written, the late rank is named, and the attempt ends. 0: off."""
    unknown_s: float = 1800.0
    """The same limit where the duration is not known: the start, loading, saving, and the first
    pass of each kind, which may compile kernels."""
    max_skipped_steps: int = 3
    """Steps that may be skipped among any `skip_window` steps because a loss or gradient is not
    finite; one more stops the run. 0: the first stops it."""
    skip_window: int = 100
    """Steps that `max_skipped_steps` refers to."""
    spike_factor: float = 0.0
    """A loss is a spike if it exceeds the median of the last `spike_window` losses by this many
    times their spread (1.48 times the median deviation): then the run returns to its newest
    checkpoint and leaves out the data of the steps since. 6 is a usual value. 0: off."""
    spike_window: int = 64
    """Number of losses that `spike_factor` refers to; before so many steps nothing is a spike."""
    max_rollbacks: int = 3
    """Returns to a checkpoint because of spikes in the whole run; after that a spike stops it."""
    replica_check_every: int = 0
    """Steps between comparisons of all parameters that several ranks hold, bit for bit, which
    finds memory and arithmetic that are silently wrong; a difference stops the attempt and names
    the rank. 0: off."""
    straggler_percent: float = 8.0
    """A rank whose own time of a step (without waiting for others) is longer than the median of
    all ranks by this many percent, over 10 steps and clearly beyond their scatter, is named.
    0: off."""

    def __post_init__(self) -> None:
        between(self, 0, 1e6, "frozen_s", "hang_s", "unknown_s", "straggler_percent")
        between(self, 0, 2**31, "max_skipped_steps", "replica_check_every", "max_rollbacks")
        between(self, 1, 2**31, "skip_window")
        between(self, 0, 1e6, "spike_factor")
        between(self, 4, 2**20, "spike_window")
        for key in ("frozen_s", "hang_s"):
            if 0 < getattr(self, key) < 1:
                raise ConfigError(
                    f"{key} = {getattr(self, key)}: must be 0 (off) or at least 1 second"
                )
        if self.unknown_s < self.hang_s:
            raise ConfigError(
                f"unknown_s = {self.unknown_s}: must be at least hang_s = {self.hang_s}"
            )

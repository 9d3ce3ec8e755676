"""Garbage collection at chosen steps, the same on all ranks.

Python's own collector starts whenever enough objects were created, at another time on every rank,
and each step waits for the slowest rank.
"""

import gc


class GarbageCollection:
    """Collects after a fixed number of steps instead of at times that Python chooses."""

    def __init__(self, every: int) -> None:
        self.every = every
        gc.disable()
        gc.collect(_GENERATION)

    def run(self, step: int) -> None:
        """Collect if this step (counted from 1) is one of those."""
        if step % self.every == 0:
            gc.collect(_GENERATION)


_GENERATION = 1
"""Tensors of a step are young; the oldest generation, with all of torch's modules, takes long."""

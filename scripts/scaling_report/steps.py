"""Which steps of a run count; without torch, so that a login node can plan runs."""

WARMUP = 2
"""First steps of a run, which are left out: they allocate and compile."""
LEAST_STEPS = 3
"""Steps that a figure needs after the warmup."""

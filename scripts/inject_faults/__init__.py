"""Injects faults into a running training, to see that it survives them."""

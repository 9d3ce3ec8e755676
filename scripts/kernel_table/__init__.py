"""Compiled for GPUs that are not here: one module per family of kernels, each with `cases`."""

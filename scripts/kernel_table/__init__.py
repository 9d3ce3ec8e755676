"""Compilation for absent GPUs: one module per family of kernels, each with `cases`."""

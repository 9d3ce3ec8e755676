"""Kernels with their plain-torch references; the name of a function is its contract."""

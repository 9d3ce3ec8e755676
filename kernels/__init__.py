"""Kernels with their plain-torch references; the docstring of a function is its contract."""

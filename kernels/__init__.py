"""Kernels with their plain-torch references; the docstring of a function is its contract."""

import os

# Triton 3.9 requires an explicit choice, and the default becomes "off" in 3.10: without fused
# multiply-adds, promotion in the FP8 products takes twice the instructions
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

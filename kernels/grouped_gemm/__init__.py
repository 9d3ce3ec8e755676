"""Products of rows grouped by expert, in bf16 and FP8, each with its gradients; Triton, and torch
on a CPU.
"""

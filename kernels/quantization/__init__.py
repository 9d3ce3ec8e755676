"""Quantization from bf16 to FP8 and back: scales per 1x128, 128x1 and 128x128 values, and of pieces
of a sharded weight.
"""

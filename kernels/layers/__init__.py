"""Layers other than products: RMSNorm, RoPE, attention on a CPU, cross-entropy in chunks."""

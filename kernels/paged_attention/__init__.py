"""Attention over keys and values, or latents, in the pages of a KV cache."""

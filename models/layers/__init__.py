"""Projections, embedding, norm and RoPE, with support for sharded parameters, for any model."""

"""Projections, embedding, norm and RoPE, whose parameters may be sharded; they know no model."""

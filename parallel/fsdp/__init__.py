"""Additions to FSDP2: what stays whole between the microbatches of a step (ZeRO's stages), and
weights that are gathered in FP8."""

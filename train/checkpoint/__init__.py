"""Checkpoints that any mesh can read, which of them are kept, and where a run starts."""

"""Checkpoints that any mesh can read, their retention, and the start of a run."""

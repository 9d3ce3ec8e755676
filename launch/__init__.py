"""Starts runs on one machine and on SLURM; imports neither torch nor any floor but configs."""

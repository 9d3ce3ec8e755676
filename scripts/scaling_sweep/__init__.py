"""Trains an experiment at several numbers of ranks, on this machine or on SLURM, for a report of
scaling efficiency."""

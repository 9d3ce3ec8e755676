"""Starts runs on one machine, on SLURM and on Kubernetes; imports configs only, and no torch."""

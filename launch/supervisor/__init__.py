"""Starts the ranks of a training on this host, watches them, and starts them again after a failure
that another attempt may survive."""

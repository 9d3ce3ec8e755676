"""Measures the loader of batches and others in one run."""

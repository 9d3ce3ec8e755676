"""Serving benchmarks over HTTP: our server and others, with the same requests, in one run."""

"""Meshes, parallelization of a model, token dispatch, and the shards of a tensor on each rank."""

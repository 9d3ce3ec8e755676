"""Meshes, their application to a model, token dispatch, and what a rank owns of a tensor."""

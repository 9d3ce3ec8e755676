"""Tokenized datasets on disk, and which of their sequences a training step reads."""

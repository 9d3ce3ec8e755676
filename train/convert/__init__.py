"""Conversion of checkpoints to and from other forms: Hugging Face folders, GGUF files, dense models
that become mixtures of experts.
"""

"""Hugging Face form: one file per family, one table that both directions read, and the files."""

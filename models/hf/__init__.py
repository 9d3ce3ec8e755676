"""Hugging Face form: one file per family, one table for export and import, and the files."""

"""Converts text to the microbatches of a step: reading, deduplication, tokenized corpora."""

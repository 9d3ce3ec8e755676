"""From a source of text to the microbatches of a step: reading, duplicates, tokenized corpora."""

"""Makes a tokenized dataset of text files: reading, deduplication, tokens; in several processes."""

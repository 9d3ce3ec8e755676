"""Text to tokens, and the texts and bytes of single tokens."""

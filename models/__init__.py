"""The decoder, its initialisation, its counts and its Hugging Face form. Knows no parallelism."""

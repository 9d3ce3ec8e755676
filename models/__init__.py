"""The decoder, its initialization, its counts and its Hugging Face form. Knows no parallelism."""

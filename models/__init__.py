"""The decoder, its initialization, its counts and its Hugging Face form; independent of
parallelism."""

"""One file per Hugging Face architecture: the models it can express, its config.json, its
tensors."""

"""One file per Hugging Face architecture: when it expresses a model, its config.json, its
tensors."""

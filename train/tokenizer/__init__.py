"""Training a tokenizer or using an existing one, and the files that belong to a model."""

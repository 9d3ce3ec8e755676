"""Training a tokenizer or taking a given one, and the files that go with a model."""

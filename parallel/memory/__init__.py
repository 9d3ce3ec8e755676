"""What a rank holds and exchanges in a step, predicted by running the model's own code on tensors
without data."""

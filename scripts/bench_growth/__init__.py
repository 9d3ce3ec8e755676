"""How a training step's time and memory grow with the model, the sequence and the ranks."""

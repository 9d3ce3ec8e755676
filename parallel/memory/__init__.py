"""Memory tracing: a step of the real model, on a fake process group and tensors without data, with
every byte that it holds and exchanges counted by category."""

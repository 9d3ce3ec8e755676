"""Memory tracing: runs a step of the real model on a fake process group and tensors without data,
and counts all bytes that it holds and exchanges by category."""

"""The trainer: data, loss, optimizer, checkpoints, metrics, the step loop."""

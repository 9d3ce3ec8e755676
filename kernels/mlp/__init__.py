"""SwiGLU, and its MLP with the two products as one operation: dense or grouped, bf16 or FP8."""

"""SwiGLU, and the two products around it as one operation: dense or grouped, bf16 or FP8."""

"""`python -m scripts.fp8_convergence`: FP8 against bf16 over whole trainings, and ablations."""

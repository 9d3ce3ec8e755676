"""`python -m scripts.bench_train`: the trainer against a plain loop, in alternating runs."""

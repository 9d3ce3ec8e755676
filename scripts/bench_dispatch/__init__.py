"""`python -m scripts.bench_dispatch`: token dispatchers, also over a slow link."""

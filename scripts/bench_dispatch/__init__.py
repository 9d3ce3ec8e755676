"""`python -m scripts.bench_dispatch`: strategies of token dispatch, also over a slow link."""

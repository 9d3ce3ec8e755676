"""`python -m scripts.gpu_suite`: every kernel on a CUDA device, correctness first, then time.

Needs only torch, triton and numpy (torch 2.11 and Triton 3.6 or newer), no network. A section is a
module here with `check` and `measure`; `sections.SECTIONS` lists them, `runner` runs them.
"""

"""The forward pass on CUDA: attention by kernels that read the pages, decode steps as graphs."""

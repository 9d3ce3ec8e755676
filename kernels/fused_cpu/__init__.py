"""A decoder block on a CPU with AVX512-BF16, in two calls of C++ with the bits of training."""

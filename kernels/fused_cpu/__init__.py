"""A decoder block on a CPU with AVX512-BF16: two C++ calls, bitwise equal to training without
AMX."""

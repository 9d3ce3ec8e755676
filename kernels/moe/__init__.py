"""Router, choice of the best experts, and permutation of rows to experts and back."""

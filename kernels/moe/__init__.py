"""Router, choice of the best experts, and the movement of rows to experts and back."""

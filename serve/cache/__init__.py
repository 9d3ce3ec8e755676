"""Memory of keys and values in pages."""

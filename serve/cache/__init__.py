"""Memory of keys and values in pages, and the index of cached prefixes."""

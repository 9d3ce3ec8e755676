"""Memory of keys and values in pages, and which prefixes lie in them."""

"""Parsing of an untrusted `config.json`: its keys, defaults of missing keys, RoPE."""

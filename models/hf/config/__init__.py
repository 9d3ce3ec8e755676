"""Reading an untrusted `config.json`: its keys, what is meant where they are missing, RoPE."""

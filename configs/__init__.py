"""The experiments (TOML) and their typed schema. Nothing here imports torch."""

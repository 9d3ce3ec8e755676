"""The process of a rank: how it is forked, which signals stop it, deterministic settings."""

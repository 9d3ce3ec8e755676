"""The process of a rank: how it is forked, which signals stop it, and its deterministic settings."""

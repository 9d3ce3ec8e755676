"""Paths as settings spell them."""

import os
from pathlib import Path

from configs.errors import ConfigError
from configs.rules import shown


def local_path(setting: str | Path) -> Path:
    """The path a setting means: `~` alone or before a slash is the user's home folder, and nothing
    else is interpreted (`~name` is a file of that name). Raises ConfigError without a home."""
    text = str(setting)
    if text != "~" and not text.startswith("~/"):
        return Path(text)
    home = os.path.expanduser("~")
    if home == "~":
        raise ConfigError(f"{shown(text)}: this account has no home folder; write the path in full")
    return Path(home + text[1:])

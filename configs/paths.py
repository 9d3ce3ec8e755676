"""Paths in settings and options."""

import os
import re
from pathlib import Path

from configs.errors import ConfigError, UserError
from configs.rules import shown


def check_folder(key: str, setting: str) -> None:
    """Raise ConfigError if an output folder is the root of the file system, also through `~`,
    `..` or a link."""
    if os.path.realpath(local_path(setting)) == "/":
        raise ConfigError(
            f"{key} = {shown(setting)}: leads to the root of the file system; name a folder in it"
        )


def local_path(setting: str | Path) -> Path:
    """The path of a setting. A `~` that is alone or before a slash is the user's home folder;
    nothing else is expanded (`~name` is a file of that name). Raises ConfigError without a home
    folder."""
    text = str(setting)
    if text != "~" and not text.startswith("~/"):
        return Path(text)
    home = os.path.expanduser("~")
    if home == "~":
        raise ConfigError(f"{shown(text)}: this account has no home folder; write the path in full")
    return Path(home + text[1:])


def is_url(setting: str) -> bool:
    """Whether a setting is the URL of an object store, such as `s3://bucket/folder`."""
    return re.match(r"[a-z][a-z0-9+.-]*://", setting) is not None


def read_text(path: Path, option: str = "") -> str:
    """The text of a UTF-8 file. Raises UserError, which names `option`, if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"{option} {path}: {reason}".lstrip()) from None

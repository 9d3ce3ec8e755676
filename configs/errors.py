"""Errors that the user can fix: one line each, without a traceback."""

import re

_LONGEST = 1000
"""Characters of a message; values of an experiment are shortened much more."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class UserError(ValueError):
    """Something that the user specified cannot be used: a file, folder, option or environment
    variable.

    The message is one line: what is wrong, where, and what would be right. Quoted text cannot break
    the line: control characters and unpaired surrogates are escaped. A message that is too long
    loses its middle, because the remedy is at the end.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shortened(escaped(message), _LONGEST))


class ConfigError(UserError):
    """A setting of an experiment that cannot work; the message names its key."""


def escaped(text: str) -> str:
    """`text` with escapes for control characters and unpaired surrogates."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def shortened(text: str, length: int) -> str:
    """`text`, without its middle where it has more than `length` characters."""
    if len(text) <= length:
        return text
    end = length // 3
    return f"{text[: length - end - 5]} ... {text[-end:]}"

"""Errors that are the user's to mend: one line each, without a traceback."""

import re

_LONGEST = 1000
"""Characters of a message; an experiment's own values are shown much shorter."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class UserError(ValueError):
    """Something that the user gave cannot be used: a file, a folder, an option, the environment.

    The message is one line: what is wrong, where, and what would be right. Whatever it quotes
    stays within that line: control characters and halves of surrogate pairs are escaped, and of a
    message that is too long the middle is left out, since the remedy is last.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shortened(_CONTROL.sub(_escaped, message), _LONGEST))


class ConfigError(UserError):
    """A setting of an experiment that cannot work; the message names its key."""


def _escaped(found: re.Match[str]) -> str:
    return repr(found[0])[1:-1]


def shortened(text: str, length: int) -> str:
    """`text`, without its middle where it has more than `length` characters."""
    if len(text) <= length:
        return text
    end = length // 3
    return f"{text[: length - end - 5]} ... {text[-end:]}"

"""Quotes contents of an untrusted folder in error messages: on one line and with limited length.

A value of config.json can be 60 KB long or nested a thousand deep, the name of a tensor or of a
file can contain a line break. Errors quote only enough to find the place.
"""

import reprlib
from pathlib import Path

_MOST = 200
"""Characters of one value."""
_MOST_LINE = 600
"""Characters of a whole error."""
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 3, 80, 80, 40
_REPR.maxlist = _REPR.maxdict = 12


def shown(value: object) -> str:
    """`value` in Python's notation, shortened in its middle if it is long; always one line."""
    return _cut(_REPR.repr(value), _MOST)


def named(name: object) -> str:
    """The name of a tensor or file: unchanged if it is short and plain, else as `shown`."""
    text = str(name)
    return text if len(text) <= _MOST and text.isprintable() else _cut(repr(text), _MOST)


def located(path: Path) -> str:
    """A path whose last part is untrusted."""
    return str(path.parent / named(path.name))


def one_line(error: object) -> str:
    """The text of a library's error, on one line and shortened to the maximum length of an
    error."""
    return _cut(" ".join(str(error).split()), _MOST_LINE)


def _cut(text: str, most: int) -> str:
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"

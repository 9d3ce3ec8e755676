"""Checks that all sections of the schema share, and how their messages quote a value."""

from dataclasses import fields
from typing import Any

from configs.errors import ConfigError, shortened


def shown(value: Any) -> str:
    """A value as a message quotes it: at most 80 characters of its repr."""
    if isinstance(value, str | bytes):
        value = value[:200]  # longer than the result: repr takes time
    try:
        return shortened(repr(value), 80)
    except ValueError:  # Python converts at most 4,300 digits
        return "an integer of thousands of digits"
    except RecursionError:
        return "a deeply nested value"


def at_least(section: object, minimum: float, *keys: str) -> None:
    """Raise ConfigError if one of the section's keys is below `minimum`."""
    for key in keys:
        value = getattr(section, key)
        if not value >= minimum:  # also true for NaN
            raise ConfigError(f"{key} = {shown(value)}: must be at least {minimum}")


def between(section: object, low: float, high: float, *keys: str) -> None:
    """Raise ConfigError if one of the section's keys is outside [low, high]."""
    for key in keys:
        value = getattr(section, key)
        if not low <= value <= high:
            raise ConfigError(f"{key} = {shown(value)}: must lie between {low} and {high}")


def at_most(limit: int, what: str, **sizes: int) -> None:
    """Raise ConfigError if the product of the sizes, given by their keys (`__` for a dot),
    exceeds `limit`. what: the unit of the product."""
    product = 1
    for size in sizes.values():
        product *= size
    if product > limit:
        factors = " x ".join(f"{key.replace('__', '.')} {size}" for key, size in sizes.items())
        raise ConfigError(
            f"{factors} = {product} {what}: must be at most {limit}; use smaller ones"
        )


def belongs_to(section: Any, condition: str, *keys: str) -> None:
    """Raise ConfigError if one of the section's keys is not at its default.

    condition: the setting without which the keys have no meaning.
    """
    defaults = {spec.name: spec.default for spec in fields(section)}
    for key in keys:
        value = getattr(section, key)
        if value != defaults[key]:
            raise ConfigError(
                f"{key} = {shown(value)}: belongs to {condition}; leave it out, or set {condition}"
            )


def not_empty(section: object, example: str, *keys: str) -> None:
    """Raise ConfigError if one of the section's strings is empty or blank."""
    for key in keys:
        if not getattr(section, key).strip():
            raise ConfigError(f"{key} is empty: {example}")

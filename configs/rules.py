"""The user's error, and the checks that every section of the schema shares."""


class ConfigError(ValueError):
    """A setting that cannot work. The message is one line for the user: key, fault, remedy."""


def at_least(section: object, minimum: float, *keys: str) -> None:
    """Raise ConfigError where one of the section's keys is below `minimum`."""
    for key in keys:
        value = getattr(section, key)
        if not value >= minimum:  # catches NaN, too
            raise ConfigError(f"{key} = {value}: must be at least {minimum}")


def between(section: object, low: float, high: float, *keys: str) -> None:
    """Raise ConfigError where one of the section's keys is outside [low, high]."""
    for key in keys:
        value = getattr(section, key)
        if not low <= value <= high:
            raise ConfigError(f"{key} = {value}: must lie between {low} and {high}")

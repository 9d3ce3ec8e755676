"""The argument parser of all commands with options other than settings."""

import argparse
from typing import Any, NoReturn

from configs.errors import shortened


class CommandParser(argparse.ArgumentParser):
    """argparse with errors of one line and exit code 2, as in all our commands; descriptions keep
    their lines."""

    def __init__(
        self,
        *,
        formatter_class: type[argparse.HelpFormatter] = argparse.RawDescriptionHelpFormatter,
        **options: Any,
    ) -> None:
        super().__init__(formatter_class=formatter_class, **options)

    def error(self, message: str) -> NoReturn:
        """Print the mistake without the usage, and exit with code 2."""
        line = shortened(" ".join(message.splitlines()), 500)
        self.exit(2, f"error: {line}; see {self.prog} --help\n")

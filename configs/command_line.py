"""The argument parser of all commands with options other than settings."""

import argparse
from typing import NoReturn

from configs.errors import shortened


class CommandParser(argparse.ArgumentParser):
    """argparse with errors of one line and exit code 2, as in all our commands."""

    def error(self, message: str) -> NoReturn:
        """Print the mistake without the usage, and exit with code 2."""
        line = shortened(" ".join(message.splitlines()), 500)
        self.exit(2, f"error: {line}; see {self.prog} --help\n")

"""The command-line options that all commands of `launch` for clusters have in common."""

import argparse
import os
import re
from dataclasses import replace
from pathlib import Path

from configs.command_line import CommandParser
from configs.errors import UserError
from launch.site import KubernetesSite, Site, load_site

SITE_OPTIONS = ("--partition", "--account", "--qos", "--time", "--constraint", "--exclude")
"""Each replaces the key of the same name in [slurm] of the site file."""


def slurm_parser(prog: str, description: str | None, file: str) -> CommandParser:
    """A parser with the options of every SLURM job. file: help of its first argument."""
    parser = CommandParser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("file", help=file)
    parser.add_argument("--nodes", required=True, help="nodes of the job; of a sweep, several")
    parser.add_argument("--name", default="", help="job name; default: name of the run's folder")
    parser.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    slurm_options(parser)
    return parser


def slurm_options(parser: CommandParser) -> list[str]:
    """Add the site file and the options that replace its keys; returns their names."""
    parser.add_argument("--site", type=Path, help="site file (TOML); default: $PHALANX_SITE")
    for option in SITE_OPTIONS:
        parser.add_argument(option, help=f"replaces slurm.{option[2:]} of the site file")
    return ["site", *(option[2:] for option in SITE_OPTIONS)]


def parsed(parser: CommandParser, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options and overrides. Raises UserError for words that are neither."""
    options, overrides = parser.parse_known_args(arguments)
    if wrong := [word for word in overrides if not (word.startswith("--") and "=" in word)]:
        raise UserError(f"{wrong[0]!r}: neither an option nor --section.key=value")
    return options, overrides


def counts(text: str, most: int, option: str = "--nodes") -> list[int]:
    """The numbers in `N` or `N,N,...`. Raises UserError."""
    words = text.split(",")
    if len(words) > most or not all(re.fullmatch(r"[1-9][0-9]{0,4}", word) for word in words):
        several = ", or several separated by commas" if most > 1 else ""
        raise UserError(f"{option} {text}: must be a number from 1 to 99999{several}")
    return [int(word) for word in words]


def chosen_site(path: Path | None) -> Site:
    """The site of the file, or of $PHALANX_SITE. Raises ConfigError."""
    return load_site(
        path or (Path(os.environ["PHALANX_SITE"]) if os.environ.get("PHALANX_SITE") else None)
    )


def slurm_site(path: Path | None, options: dict[str, object]) -> Site:
    """The site with the options in place of its keys. Raises ConfigError."""
    site = chosen_site(path)
    if site.kubernetes != KubernetesSite():
        raise UserError(
            f"{path or os.environ['PHALANX_SITE']}: kubernetes: belongs to "
            "python -m launch.kubernetes; use another site file for SLURM"
        )
    keys = [option[2:] for option in SITE_OPTIONS]
    given = {key: options[key] for key in keys if options[key] is not None}
    return replace(site, slurm=replace(site.slurm, **given))  # type: ignore[arg-type]

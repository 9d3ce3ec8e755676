"""`python -m configs FILE.toml [--ranks N] [--section.key=value ...]`: check without torch.

Checks keys, types and mesh, as a login node can. `--reference` prints every key with its type,
default and documentation as Markdown instead (docs/config.md is that output).
"""

import sys

from configs.degrees import default_world, resolve
from configs.loader import load
from configs.rules import ConfigError


def main(arguments: list[str]) -> int:
    """Check the experiment; returns the exit code."""
    if arguments == ["--reference"]:
        from configs.reference import reference

        print(reference(), end="")
        return 0
    try:
        files = [a for a in arguments if not a.startswith("--")]
        ranks = [a.removeprefix("--ranks=") for a in arguments if a.startswith("--ranks=")]
        overrides = [a for a in arguments if a.startswith("--") and not a.startswith("--ranks=")]
        if len(files) != 1 or not all(r.isdigit() and int(r) for r in ranks):
            raise ConfigError(
                "usage: python -m configs FILE.toml [--ranks=N] [--section.key=value ...]"
            )
        config = load(files[0], overrides)
        degrees = resolve(config, int(ranks[-1]) if ranks else default_world(config))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{files[0]}: all keys and types are right; the mesh for {degrees.world} ranks:")
    for axis, size, meaning in degrees.table():
        print(f"  {axis:<13} {size:>5}   {meaning}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`python -m configs FILE.toml [--ranks N] [--section.key=value ...]`: check without torch.

Checks keys, types and the mesh, for example on a login node, and lists settings without effect.
`--reference` prints every key with its type, default and documentation as Markdown instead
(docs/config.md is that output).
"""

import sys

from configs.config_warnings import config_warnings
from configs.errors import ConfigError
from configs.loader import load, parse_arguments
from configs.parallel_dims import default_world, resolve


def main(arguments: list[str]) -> int:
    """Check the experiment; returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    if arguments == ["--reference"]:
        from configs.reference import reference

        print(reference(), end="")
        return 0
    try:
        file, overrides, ranks = parse_arguments(arguments)
        config = load(file, overrides)
        parallel_dims = resolve(config, ranks or default_world(config))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{file}: all keys and types are right; the mesh for {parallel_dims.world} ranks:")
    for axis, size, meaning in parallel_dims.table():
        print(f"  {axis:<13} {size:>5}   {meaning}")
    for line in config_warnings(config):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

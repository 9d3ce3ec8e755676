"""`python -m scripts.import_hf PATH OUT`: converts a Hugging Face folder to one of our checkpoints.

    python -m scripts.import_hf Qwen3-30B-A3B qwen3
    python -m train qwen3/config.toml --check
    python -m scripts.export qwen3 --dtype bf16         # and back: the same bits

PATH is a folder on this disk with config.json and safetensors; OUT is a new folder with the layout
of a run (`train.convert.hf_import`).
"""

import sys
from pathlib import Path

from configs.command_line import CommandParser
from configs.errors import UserError
from parallel.ranks import one_line
from train.atomic_files import naming
from train.convert.hf_import import import_hf


def main() -> int:
    """Command line; returns the exit code."""
    parser = CommandParser(prog="python -m scripts.import_hf", description=__doc__)
    parser.add_argument("path", type=Path, help="Hugging Face folder with safetensors")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument(
        "--ignore-auto-map", action="store_true",
        help="accept a config.json that names Python code (it is not run either way)",
    )  # fmt: skip
    arguments = parser.parse_args()
    try:
        with naming(arguments.out):
            saved, lines = import_hf(
                arguments.path, arguments.out, ignore_auto_map=arguments.ignore_auto_map
            )
    except (UserError, OSError) as error:
        line = one_line(error) if isinstance(error, OSError) else error
        print(f"error: {line}", file=sys.stderr)
        return 2
    print(*lines, f"imported {saved}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m scripts.to_gguf EXPORT`: converts an export to GGUF with llama.cpp's own converter.

    python -m scripts.to_gguf runs/demo/export --llama-cpp ~/llama.cpp --dtype bf16

`--llama-cpp` is a source tree of llama.cpp; its converter needs torch, transformers and numpy in
`--python` (default: this one). `scripts.check_readers` compares the results of llama.cpp.
"""

import sys
from pathlib import Path

from configs.command_line import CommandParser
from configs.errors import UserError
from train.convert.gguf_export import DTYPES, export_gguf


def main() -> int:
    """Command line; returns the exit code."""
    parser = CommandParser(prog="python -m scripts.to_gguf", description=__doc__)
    parser.add_argument("export", type=Path, help="folder written by scripts.export")
    parser.add_argument("--llama-cpp", type=Path, required=True, help="llama.cpp's source tree")
    parser.add_argument("--python", default=sys.executable, help="runs the converter")
    parser.add_argument("--out", type=Path, help="default: EXPORT/model-DTYPE.gguf")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: bf16")
    arguments = parser.parse_args()
    out = arguments.out or arguments.export / f"model-{arguments.dtype}.gguf"
    try:
        export_gguf(arguments.export, out, arguments.dtype, arguments.llama_cpp, arguments.python)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

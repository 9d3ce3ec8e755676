"""`python -m scripts.to_gguf EXPORT`: an export becomes a GGUF file, by llama.cpp's own converter.

    python -m scripts.to_gguf runs/demo/export --llama-cpp ~/llama.cpp --dtype bf16

`--llama-cpp` is a source tree of llama.cpp; its converter needs torch, transformers and numpy in
`--python` (default: this one). A tokenizer trained here is unknown to the converter, which
recognises tokenizers by a hash; `scripts/check_readers/convert_gguf.py` tells it. Given tokenizers
are left to the converter. What llama.cpp makes of the file, `scripts.check_readers` compares.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tokenizers import Tokenizer

from configs.errors import UserError
from configs.paths import local_path
from models.hf.files import read_config
from train.tokenizer.tokenizer import cuts_words_as_ours

DTYPES = ("f32", "bf16", "f16", "q8_0")
_CONVERTER = Path(__file__).parent / "check_readers" / "convert_gguf.py"


def llama_cpp_words(folder: Path) -> str | None:
    """llama.cpp's name for how the export's tokenizer cuts words; None where it is not ours."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = cuts_words_as_ours(tokenizer) and json.loads(tokenizer.to_str())["model"].get(
        "ignore_merges", False
    )
    return "llama-bpe" if ours else None


def to_gguf(folder: Path, out: Path, dtype: str, llama_cpp: Path, python: str) -> None:
    """Write the export `folder` as the GGUF file `out`. Raises UserError."""
    read_config(folder)
    converter = local_path(llama_cpp).resolve() / "convert_hf_to_gguf.py"
    if not converter.is_file():
        raise UserError(f"--llama-cpp {llama_cpp}: has no {converter.name}; name a source tree")
    pre = llama_cpp_words(folder)
    program = [str(converter)] if pre is None else [str(_CONVERTER), str(converter.parent), pre]
    partial = out.with_name(f".{out.name}.partial")
    done = subprocess.run(
        [python, "-P", *program, str(folder), "--outfile", str(partial), "--outtype", dtype],
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    if done.returncode or not partial.is_file():
        partial.unlink(missing_ok=True)
        raise UserError(f"{converter}: {last_error(done.stderr)}")
    partial.rename(out)


def last_error(text: str) -> str:
    """The error that ends a traceback; where there is none, the last line that says something."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = re.findall(r"^(?:\[rank0\]: )?([\w.]*(?:Error|Exception)\b.*)", text, re.MULTILINE)
    return str((errors or lines or ["no output"])[-1])


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m scripts.to_gguf")
    parser.add_argument("export", type=Path, help="folder written by scripts.export")
    parser.add_argument("--llama-cpp", type=Path, required=True, help="llama.cpp's source tree")
    parser.add_argument("--python", default=sys.executable, help="runs the converter")
    parser.add_argument("--out", type=Path, help="default: EXPORT/model-DTYPE.gguf")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: bf16")
    arguments = parser.parse_args()
    out = arguments.out or arguments.export / f"model-{arguments.dtype}.gguf"
    try:
        to_gguf(arguments.export, out, arguments.dtype, arguments.llama_cpp, arguments.python)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Converts an export to a GGUF file with llama.cpp's own converter in a separate process.

The converter recognizes tokenizers by a hash, so a tokenizer trained here is unknown to it;
`train/convert/llama_cpp_converter.py` supplies its type. Existing tokenizers use the converter's
own detection.
"""

import json
import os
import re
import subprocess
from pathlib import Path

from tokenizers import Tokenizer

from configs.errors import UserError
from configs.paths import local_path
from models.hf.files import read_config
from train.tokenizer.tokenizer import cuts_words_as_ours

DTYPES = ("f32", "bf16", "f16", "q8_0")
_CONVERTER = Path(__file__).with_name("llama_cpp_converter.py")


def llama_cpp_words(folder: Path) -> str | None:
    """llama.cpp's name for the pre-tokenizer of the export; None if it is not the one used here."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = cuts_words_as_ours(tokenizer) and json.loads(tokenizer.to_str())["model"].get(
        "ignore_merges", False
    )
    return "llama-bpe" if ours else None


def export_gguf(folder: Path, out: Path, dtype: str, llama_cpp: Path, python: str) -> None:
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
    """The error at the end of a traceback; otherwise the last non-empty line."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = re.findall(r"^(?:\[rank0\]: )?([\w.]*(?:Error|Exception)\b.*)", text, re.MULTILINE)
    return str((errors or lines or ["no output"])[-1])

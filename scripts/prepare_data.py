"""`python -m scripts.prepare_data SOURCE... --tokenizer PATH --out DIR`: text to tokens, once.

    python -m scripts.prepare_data web.jsonl.zst books/ --tokenizer qwen3/ --out prepared/web
    python -m scripts.prepare_data ~/code --train-tokenizer 32000 --out prepared/code --processes 8
    python -m scripts.prepare_data --verify prepared/web

SOURCE is a text file, a file of JSON lines (.jsonl, .ndjson, also .gz and .zst), a Parquet file, a
folder of such files and of source code, or a Hugging Face dataset: a folder of `save_to_disk`, or a
name on the Hub. The same command continues a preparation that was killed. docs/data.md describes
the format and the options.
"""

import os
import sys
from pathlib import Path

from configs.command_line import CommandParser
from configs.errors import UserError
from configs.paths import local_path
from train.data.documents import shown
from train.dataset.prepared import BLOCK, verify
from train.prepare.pipeline import Output, prepare_data
from train.prepare.plan import Options


def main(arguments: list[str]) -> int:
    """Command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        if options.verify:
            for source in options.sources:
                size = verify(local_path(source))
                print(f"{shown(source)}: {size:,} bytes match their checksums")
            return 0
        index = prepare_data(*_settings(options), lambda line: print(line, flush=True))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{shown(error.filename)}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    for split, entry in index["splits"].items():
        print(f"{split}: {entry['documents']:,} documents, {entry['tokens']:,} tokens")
    print(f"wrote {shown(options.out)}")
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m scripts.prepare_data", description=__doc__)
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="files, folders, datasets")
    parser.add_argument("--out", help="folder of the dataset; it must not exist")
    parser.add_argument("--tokenizer", default="", help="tokenizer.json or its folder")
    parser.add_argument(
        "--train-tokenizer", type=int, default=0, metavar="VOCAB",
        help="train a byte-level BPE tokenizer of VOCAB tokens on the training documents",
    )  # fmt: skip
    parser.add_argument(
        "--special-tokens", nargs="*", default=[], metavar="TOKEN",
        help="further special tokens of a trained tokenizer, such as '<|fim_prefix|>'",
    )  # fmt: skip
    parser.add_argument("--text-field", default="text", help="column with the text; default: text")
    parser.add_argument(
        "--unreadable", choices=("refuse", "skip"), default="refuse",
        help="rows and files that cannot be read; skipped ones are counted and listed",
    )  # fmt: skip
    parser.add_argument("--validation-fraction", type=float, default=0.02, help="default: 0.02")
    parser.add_argument(
        "--near-duplicate-threshold", type=float, default=0.8,
        help="similarity of lines from which a document is dropped; 1: only equal ones",
    )  # fmt: skip
    parser.add_argument("--processes", type=int, default=0, help="default: all cores")
    parser.add_argument("--megatron", action="store_true", help="also write .bin and .idx files")
    parser.add_argument(
        "--shard-mib", type=int, default=1024, help="size of a token file; default: 1024"
    )
    parser.add_argument("--verify", action="store_true", help="compare datasets with checksums")
    return parser


def _settings(given: object) -> tuple[Options, Output]:
    """The settings of a command line. Raises UserError."""
    options = vars(given)
    if not options["out"]:
        raise UserError("--out: name the folder of the dataset")
    if bool(options["tokenizer"]) == bool(options["train_tokenizer"]):
        raise UserError("give either --tokenizer PATH or --train-tokenizer VOCAB")
    if options["special_tokens"] and not options["train_tokenizer"]:
        raise UserError("--special-tokens: belongs to --train-tokenizer")
    for name, low, high in (
        ("validation_fraction", 0.0, 0.5), ("near_duplicate_threshold", 0.0, 1.0),
        ("processes", 0, 4096), ("shard_mib", 1, 2**20),
    ):  # fmt: skip
        if not low <= options[name] <= high:
            raise UserError(
                f"--{name.replace('_', '-')} {options[name]}: must lie between {low} and {high}"
            )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Options(
        sources=tuple(options["sources"]),
        text_field=options["text_field"],
        unreadable=options["unreadable"],
        tokenizer=options["tokenizer"],
        train_vocab=options["train_tokenizer"],
        special_tokens=tuple(options["special_tokens"]),
        validation_fraction=options["validation_fraction"],
        near_duplicate_threshold=options["near_duplicate_threshold"],
    ), Output(
        folder=Path(local_path(options["out"])),
        n_processes=options["processes"] or cores or 1,
        megatron=options["megatron"],
        shard_bytes=options["shard_mib"] * (2**20 // BLOCK) * BLOCK,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

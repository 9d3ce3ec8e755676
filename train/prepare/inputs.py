"""The sources of a dataset, divided into units of work.

A unit is a list of small text files, one text file, a range of bytes of JSON lines, a compressed
file, some row groups of a Parquet file, or a range of rows of a Hugging Face dataset: about
UNIT_BYTES of input, in at most UNIT_FILES files. The units, their order and the order of the
documents within them depend on the inputs alone, never on the number of processes.
"""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.paths import local_path
from train.data.documents import shown
from train.data.folders import list_folder
from train.data.hf_stream import is_stream, open_rows
from train.data.sources import (
    BINARY_SUFFIXES,
    SUPPORTED,
    TEXT_SUFFIXES,
    looks_like_path,
    reader_of,
)

UNIT_BYTES = 32 * 2**20
UNIT_FILES = 4096
"""Most files of a unit, so that small ones are shared among processes, too."""
_HF_FILES = ("dataset_dict.json", "dataset_info.json")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?")
_COMPRESSED = (".gz", ".zst")


@dataclass(frozen=True)
class Unit:
    """Part of a source that one process reads in one go. All fields are JSON."""

    source: int
    """Number of the source."""
    kind: str
    """texts, text, json, compressed, parquet, saved, hub or stream."""
    files: tuple[str, ...]
    """Paths; for `saved` the folder, for `hub` and `stream` the name."""
    start: int = 0
    """First byte, row group, row, or file of a stream."""
    end: int = 0
    """After the last."""
    size: int = 0
    """Bytes of input, for the progress."""


def find_units(sources: list[str]) -> tuple[list[Unit], list[list[Any]], list[str]]:
    """The units of all sources, the identity of their files, and messages.

    An identity is [path, size, time of modification in ns]. Raises UserError for a source that does
    not exist or has no documents.
    """
    units: list[Unit] = []
    stamps: list[list[Any]] = []
    notes: list[str] = []
    for number, setting in enumerate(sources):
        if not setting:
            raise UserError("a source is empty: '.' names the current folder")
        if is_stream(setting):
            units += _stream(number, setting)
            continue
        path = local_path(setting).absolute()
        try:
            if path.is_dir() and any((path / name).is_file() for name in _HF_FILES):
                found, files = _saved(number, path)
            elif path.is_dir():
                found, files = _folder(number, path, notes)
            elif path.is_file():
                found, files = list(_file(number, path)), [path]
            elif path.exists():
                raise UserError(
                    f"{shown(setting)}: neither a file nor a folder; it takes {SUPPORTED}"
                )
            elif _HUB_NAME.fullmatch(setting) and not looks_like_path(setting):
                found, files = _hub(number, setting)
            else:
                raise UserError(
                    f"{shown(setting)}: no such file or folder, and no name/of-a-dataset; it takes "
                    f"{SUPPORTED}, folders of them, and Hugging Face datasets"
                )
            stamps += [stamp(file) for file in files]
        except OSError as error:
            raise UserError(f"{shown(error.filename or setting)}: {error.strerror}") from None
        units += found
    return units, stamps, notes


def stamp(file: Path) -> list[Any]:
    """Identity of a file."""
    status = file.stat()
    return [str(file), status.st_size, status.st_mtime_ns]


def _folder(number: int, root: Path, notes: list[str]) -> tuple[list[Unit], list[Path]]:
    listing = list_folder(root)
    files = listing.files
    used = [file for file in files if file.suffix.lower() in TEXT_SUFFIXES or reader_of(file)]
    others = len(files) - len(used)
    kinds = [f"{others:,} files of other kinds" if others else "", listing.described()]
    passed_over = ", ".join(filter(None, kinds))
    if not used:
        has = f" (it has {passed_over})" if passed_over else ""
        raise UserError(f"{shown(root)}: no document in this folder{has}; it takes {SUPPORTED}")
    if passed_over:
        notes.append(f"{shown(root)}: passed over {passed_over}")
    units: list[Unit] = []
    texts: list[str] = []
    size = 0
    for file in used:
        if reader_of(file):
            units += _file(number, file)
            continue
        texts.append(str(file))
        size += file.stat().st_size
        if size >= UNIT_BYTES or len(texts) == UNIT_FILES:
            units.append(Unit(number, "texts", tuple(texts), size=size))
            texts, size = [], 0
    if texts:
        units.append(Unit(number, "texts", tuple(texts), size=size))
    return units, used


def _file(number: int, path: Path) -> Iterator[Unit]:
    name, size = path.name.lower(), path.stat().st_size
    if not reader_of(path) and path.suffix.lower() in BINARY_SUFFIXES:
        hint = "; one JSON object per line? name it .jsonl" if path.suffix == ".json" else ""
        raise UserError(
            f"{shown(path)}: suffix {path.suffix} is not supported; it takes {SUPPORTED}{hint}"
        )
    if not reader_of(path):
        yield Unit(number, "text", (str(path),), size=size)
    elif name.endswith(".parquet"):
        yield from _row_groups(number, path, size)
    elif name.endswith(_COMPRESSED):
        yield Unit(number, "compressed", (str(path),), size=size)
    else:
        for start in range(0, max(size, 1), UNIT_BYTES):
            end = min(start + UNIT_BYTES, size)
            yield Unit(number, "json", (str(path),), start, end, end - start)


def _row_groups(number: int, path: Path, size: int) -> Iterator[Unit]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open(path, "rb") as raw:
            metadata = pq.ParquetFile(raw).metadata
            sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    except (pa.ArrowException, OSError, ValueError):
        sizes = []  # the reader describes the error
    if not sizes:
        yield Unit(number, "parquet", (str(path),), size=size)
        return
    total, start, collected = sum(sizes) or 1, 0, 0
    for group, group_size in enumerate(sizes):
        collected += group_size
        if collected >= UNIT_BYTES or group == len(sizes) - 1:
            share = size * collected // total
            yield Unit(number, "parquet", (str(path),), start, group + 1, share)
            start, collected = group + 1, 0


def _saved(number: int, root: Path) -> tuple[list[Unit], list[Path]]:
    """A dataset of `save_to_disk`; of several splits the one called train."""
    if (root / "dataset_dict.json").is_file():
        root = root / "train"
        if not root.is_dir():
            raise UserError(f"{shown(root)}: no such split; name the folder of one split")
    files = [file for file in list_folder(root).files if file.suffix in (".arrow", ".json")]
    return _rows(number, "saved", str(root), sum(f.stat().st_size for f in files)), files


def _hub(number: int, name: str) -> tuple[list[Unit], list[Path]]:
    return _rows(number, "hub", name, 0), []


def _rows(number: int, kind: str, name: str, size: int) -> list[Unit]:
    table = load_rows(kind, name)
    n_rows = len(table)
    size = size or int(table.data.nbytes)
    parts = max(-(-size // UNIT_BYTES), 1)
    bounds = [n_rows * part // parts for part in range(parts + 1)]
    return [
        Unit(number, kind, (name,), start, end, size // parts) for start, end in pairwise(bounds)
    ]


def _stream(number: int, setting: str) -> list[Unit]:
    """A unit per file of the dataset. Their sizes are not known; for the progress all are alike."""
    n_files = open_rows(setting).num_shards
    return [
        Unit(number, "stream", (setting,), file, file + 1, UNIT_BYTES) for file in range(n_files)
    ]


def load_rows(kind: str, name: str) -> Any:
    """The table of a Hugging Face dataset. Raises UserError."""
    import datasets  # takes 0.9 s to import: only for the sources that need it

    datasets.disable_progress_bars()  # errors are reported in one line, below
    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        if kind == "saved":
            return datasets.load_from_disk(name)
        path, _, subset = name.partition(":")
        return datasets.load_dataset(path, *([subset] if subset else []), split="train")
    except Exception as error:  # the library raises many types; all mean that there is no data
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise UserError(
            f"{shown(name)}: no such file or folder, and as a Hugging Face dataset it cannot be "
            f"loaded: {reason}"
        ) from None

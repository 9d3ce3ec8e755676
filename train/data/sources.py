"""Documents of `data.source`: the standard library, text files, tables, Hugging Face datasets.

There are two steps, so that a cached corpus starts fast. `locate` reads only names, sizes and
times: it finds the user's mistakes and returns the identity of the source. `Source.read` reads the
documents (`train.data.rows` those of tables).

A document is:
- standard library, or a folder: one file;
- JSON lines, Parquet, Hugging Face dataset: one row's `data.text_field`;
- in plain text, a line that is exactly `<|endoftext|>` ends a document. A single text file without
  such lines is cut at blank lines (at line ends if it has none) into pieces of about 8,192
  characters, or of a sixteenth of the file if that is less: there must be documents to hold out.

Text is UTF-8. A single file that is not is an error; such files in a folder or in the standard
library are skipped and counted. In the name of a file no character is special except a leading `~`,
and no other file is read.
"""

import difflib
import logging
import os
import platform
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.paths import local_path
from configs.schema import DataConfig
from train.atomic_files import write_fault
from train.data.documents import Documents, shown
from train.data.folders import Listing, list_folder
from train.data.progress import reported
from train.data.rows import (
    Column,
    Row,
    Unreadable,
    WrongColumn,
    check_text,
    json_rows,
    parquet_rows,
    texts_of,
)

Log = Callable[[str], None]
TEXT_SUFFIXES = frozenset(
    ".txt .text .md .markdown .rst .tex .org .py .pyi .c .h .cc .cpp .hpp .cu .cuh .rs .go .java"
    " .js .ts .tsx .jl .lua .rb .sh .sql .toml .yaml .yml .html .css".split()
)
_JSON_LINES = (".jsonl", ".jsonlines", ".ndjson", ".ldjson")
TABLE_SUFFIXES: dict[str, Callable[[Path, Column], Iterator[Row]]] = {".parquet": parquet_rows}
TABLE_SUFFIXES |= {s + end: json_rows for s in _JSON_LINES for end in ("", ".gz", ".zst")}
BINARY_SUFFIXES = frozenset(
    ".gz .zip .tar .tgz .xz .bz2 .zst .7z .json .csv .tsv .arrow .pdf .doc .docx .epub .npy .bin"
    " .pt .safetensors .png .jpg .so .pyc".split()
)
SUPPORTED = "text files (.txt, .md, .py, ...), .jsonl or .ndjson (also .gz, .zst) and .parquet"
PIECE_LENGTH = 8192  # characters
SEPARATOR = re.compile(r"^<\|endoftext\|>[ \t]*\r?(?:\n|\Z)", re.MULTILINE)
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_FULL = re.compile("[Nn]o space left|disk space")  # libraries that drop the error number
_BATCH = 64  # rows
_PROBED = 8000  # bytes


@dataclass(frozen=True)
class Source:
    label: str
    """Short name for folders and logs."""
    identity: Any
    """JSON-able: changes when the documents do (for a Hugging Face dataset it is only the name)."""
    fill: Callable[[Documents, Log], None]
    """Adds the documents; raises UserError."""

    def read(self, folder: Path | None = None, log: Log = lambda line: None) -> Documents:
        """All documents. folder: where they are stored; None: the folder of temporary files."""
        documents = Documents(folder)
        try:
            self.fill(documents, log)
        except BaseException:
            documents.close()
            raise
        return documents


def locate(data: DataConfig) -> Source:
    """Find `data.source` without reading it. Raises UserError."""
    if data.source == "stdlib":
        return _stdlib(data)
    path = local_path(data.source)
    try:
        if path.is_dir():
            return _folder(data, path)
        if path.is_file():
            return _file(data, path)
        if path.exists():
            raise _error(data, f"neither a file nor a folder; it takes {SUPPORTED}")
        if path.is_symlink():
            raise _error(data, f"a link to {shown(os.readlink(path), 200)}: no such file or folder")
    except OSError as error:
        place = f"{shown(error.filename)}: " if error.filename not in (None, str(path)) else ""
        raise _error(data, f"{place}{error.strerror}") from None
    if _HUB_NAME.fullmatch(data.source) and not looks_like_path(data.source):
        return Source(
            label=re.sub(r"[/:]", "-", data.source),
            identity=["hub", data.source],
            fill=partial(_fill_from_hub, data),
        )
    raise _error(data, f"no such file or folder; {_near_paths(path)}")


def stdlib_root() -> Path:
    """Folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def _stdlib(data: DataConfig) -> Source:
    root = stdlib_root()
    listing = list_folder(root, skip=("site-packages", "dist-packages"))
    files = [file for file in listing.files if file.suffix == ".py"]
    sizes = [[file.relative_to(root).as_posix(), file.stat().st_size] for file in files]
    return Source(
        label="stdlib",
        identity=["stdlib", platform.python_version(), sizes],
        fill=partial(_fill_from_files, data, files, [], split_lines=False),
    )


def _folder(data: DataConfig, root: Path) -> Source:
    listing = list_folder(root)
    files = listing.files
    texts = [file for file in files if file.suffix.lower() in TEXT_SUFFIXES]
    tables = [file for file in files if reader_of(file)]
    others = Counter(f.suffix or f.name for f in sorted({*files} - {*texts, *tables}))
    kinds = [(shown(suffix, 100), count) for suffix, count in others.most_common(4)]
    if not texts and not tables:
        has = ", ".join(suffix for suffix, _ in kinds) or "nothing"
        raise _error(data, f"no document in this folder (it has {has}); it takes {SUPPORTED}")
    return Source(
        label=root.resolve().name,
        identity=["files", [_stamp(file, root) for file in texts + tables]],
        fill=partial(
            _fill_from_files, data, texts, tables, note=_passed_over(others, kinds, listing)
        ),
    )


def _passed_over(others: Counter[str], kinds: list[tuple[str, int]], listing: Listing) -> str:
    """Description of what is skipped in a folder, or empty; kinds: the most frequent of
    `others`."""
    listed = ", ".join(f"{count:,} {suffix}" for suffix, count in kinds)
    more = ", ..." * (len(others) > len(kinds))
    of_others = f"{others.total():,} files of other kinds ({listed}{more})" if kinds else ""
    parts = ", ".join(filter(None, [of_others, listing.described()]))
    return f"passed over {parts}" if parts else ""


def _file(data: DataConfig, path: Path) -> Source:
    if reader_of(path):
        texts, tables = [], [path]
    elif path.suffix.lower() in BINARY_SUFFIXES:
        hint = "; one JSON object per line? name it .jsonl" if path.suffix == ".json" else ""
        raise _error(data, f"suffix {path.suffix} is not supported; it takes {SUPPORTED}{hint}")
    else:
        texts, tables = [path], []
    return Source(
        label=path.name.split(".")[0],
        identity=["rows" if tables else "files", [_stamp(path, path.parent)]],
        fill=partial(_fill_from_files, data, texts, tables, single=True),
    )


def _fill_from_files(
    data: DataConfig,
    texts: list[Path],
    tables: list[Path],
    documents: Documents,
    log: Log,
    *,
    split_lines: bool = True,
    single: bool = False,
    note: str = "",
) -> None:
    """Add the documents of files.

    split_lines: `<|endoftext|>` lines end documents. single: the source is this one file. note: a
    message for the user about the source.
    """
    documents.notes += [note] if note else []
    for file in texts:
        try:
            text = decoded(file.read_bytes())
        except UnicodeDecodeError as error:
            if single:
                raise _error(
                    data,
                    f"not UTF-8 text (byte {error.start}: {error.reason}); it takes {SUPPORTED}",
                ) from None
            documents.not_utf8.append(shown(file))
            continue
        except OSError as error:
            raise _error(data, f"{shown(file)} cannot be read: {error.strerror}") from None
        parts = SEPARATOR.split(text) if split_lines else [text]
        if len(parts) > 1:
            parts = [part for part in parts if part.strip()]
        elif single:
            parts = cut(text)
        for part in parts:
            documents.add(part)
    columns = [_fill_from_table(data, file, documents, log, single) for file in tables]
    if any(column.missed for column in columns) and not any(column.found for column in columns):
        raise _no_column(data, [name for column in columns for name in column.others])


def decoded(raw: bytes) -> str:
    """The text of a file. Raises UnicodeDecodeError also for NUL bytes near its start, which are
    valid UTF-8 but indicate UTF-16, UTF-32 or a binary file (as in git's test of binary files)."""
    nul = raw.find(0, 0, _PROBED)
    if nul >= 0:
        raise UnicodeDecodeError("utf-8", raw, nul, nul + 1, "NUL, as in UTF-16 or a binary file")
    return raw.decode("utf-8-sig")


def _fill_from_table(
    data: DataConfig, file: Path, documents: Documents, log: Log, single: bool
) -> Column:
    """Add the rows of a file; returns where the column was found or missing."""
    column, reader = Column(data.text_field), reader_of(file)
    assert reader is not None
    name, first = shown(file), len(documents)
    place = "" if single else f"{name}, "
    rows = reported(reader(file, column), log, lambda n: f"corpus: {n:,} rows of {name} so far")
    try:
        for row in rows:
            if not isinstance(row, Unreadable):
                documents.add(row or "")
            elif data.unreadable_rows == "skip":
                documents.add_unreadable(f"{name}, {row}")
            elif row.not_utf8 and not single:
                documents.shorten(first)
                documents.not_utf8.append(name)
                break
            else:
                hint = 'data.unreadable_rows = "skip" leaves such rows out'
                raise _error(data, f"{place}{row}; fix it, or {hint}")
    except WrongColumn as error:
        if single or data.unreadable_rows == "refuse":
            raise _wrong_column(data, place, error) from None
        documents.add_unreadable(f"{name}, the whole file: {error}")
    if column.missed and not column.found:
        documents.notes.append(f"{name} has no column {_column(data)}")
    return column


def cut(text: str) -> list[str]:
    """One text as documents of at least PIECE_LENGTH (a sixteenth of it, if less), cut at the end
    of a paragraph, or of a line if there are no paragraphs, which CR alone ends if nothing else
    does. Concatenated they are `text`."""
    size = min(PIECE_LENGTH, len(text) // 16)
    for pattern in (r"\n[ \t\r]*\n\s*", r"\n", r"\r"):
        pieces, start = [], 0
        for end in re.finditer(pattern, text):
            if end.end() - start >= size:
                pieces.append(text[start : end.end()])
                start = end.end()
        if start < len(text):
            pieces.append(text[start:])
        if len(pieces) > 1:
            return pieces
    return [text]


def _fill_from_hub(data: DataConfig, documents: Documents, log: Log) -> None:
    name, _, subset = data.source.partition(":")
    rows = _load(data, name, *([subset] if subset else []))
    schema = rows.features.arrow_schema
    if data.text_field not in schema.names:
        raise _no_column(data, schema.names)
    try:
        check_text(schema, Column(data.text_field))
    except WrongColumn as error:
        raise _wrong_column(data, "", error) from None
    column = rows.select_columns(data.text_field).with_format("arrow").iter(_BATCH)
    texts: Iterable[Row] = (
        row for batch in column for part in batch.column(0).chunks for row in texts_of(part, 0)
    )
    texts = reported(texts, log, lambda n: f"corpus: {n:,} of {len(rows):,} rows so far")
    for number, row in enumerate(texts, start=1):
        if isinstance(row, Unreadable):
            raise _error(data, f"row {number}: {row.why}")
        documents.add(row or "")


def _load(data: DataConfig, *names: str) -> Any:
    """`datasets.load_dataset` of the split `train`, with errors in one line."""
    import datasets  # takes 0.9 s to import: only for the sources that need it
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    if Path(names[0]).exists() or names[0] in _PACKAGED_DATASETS_MODULES:
        # the library would read that folder, or with a name such as "json" the current one
        raise _error(data, f"no such file or folder; {names[0]} is no dataset of the Hub")
    datasets.disable_progress_bars()  # errors are reported in one line, below
    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        return datasets.load_dataset(*names, split="train")
    except Exception as error:  # the library raises many types; all mean that there is no data
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        fault = write_fault(error)
        if fault or _FULL.search(reason[0]):
            folder = (fault and fault.filename) or datasets.config.HF_CACHE_HOME
            why = (fault and fault.strerror) or reason[0][:300]
            raise _error(
                data,
                f"{shown(folder)}: the download cannot be written: {why}; HF_HOME names another "
                "folder",
            ) from None
        raise _error(
            data,
            f"no such file or folder ({_near_paths(Path(data.source))}), and as a Hugging Face "
            f"dataset (name or name:config, split train) it cannot be loaded: {reason[0][:300]}",
        ) from None


def _column(data: DataConfig) -> str:
    return f"data.text_field = {shown(data.text_field, 100)!r}"


def _no_column(data: DataConfig, names: Iterable[str]) -> UserError:
    names = list(dict.fromkeys(shown(name, 50) for name in names))
    near = difflib.get_close_matches(data.text_field, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    columns = ", ".join(names[:10]) + ", ..." * (len(names) > 10)
    return _error(data, f"no such column ({_column(data)}); it has {columns or 'none'}{hint}")


def _wrong_column(data: DataConfig, place: str, error: WrongColumn) -> UserError:
    return _error(data, f"{place}{error} ({_column(data)})")


def reader_of(file: Path) -> Callable[[Path, Column], Iterator[Row]] | None:
    """The function that reads the rows of a table; None for other files."""
    name = file.name.lower()
    return next((TABLE_SUFFIXES[s] for s in TABLE_SUFFIXES if name.endswith(s)), None)


def _stamp(file: Path, root: Path) -> list[Any]:
    status = file.stat()
    return [file.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns]


def looks_like_path(source: str) -> bool:
    """Whether a name that does not exist is a path rather than a dataset on the Hub."""
    known = TEXT_SUFFIXES | BINARY_SUFFIXES | set(TABLE_SUFFIXES)
    parent = Path(source).parent
    return (
        source[0] in "./~"
        or Path(source).suffix.lower() in known
        or (parent != Path() and parent.is_dir())
    )


def _near_paths(path: Path) -> str:
    parent = path.parent
    try:
        while not parent.is_dir():
            parent = parent.parent
        names = sorted(p.name for p in parent.iterdir() if p.name[0] != ".")
    except OSError as error:
        return f"{shown(parent)}: {error.strerror}"
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if near and parent == path.parent:
        return "did you mean " + " or ".join(shown(parent / name) for name in near) + "?"
    has = ", ".join(shown(name, 100) for name in names[:5])
    return f"{shown(parent.resolve())} has {has or 'nothing'}"


def _error(data: DataConfig, problem: str) -> UserError:
    return UserError(f"data.source = {data.source!r}: {problem}")

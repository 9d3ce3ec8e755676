"""From `data.source` to documents: the standard library, text files, tables, Hugging Face datasets.

Two steps, so that a cached corpus starts fast. `locate` looks at names, sizes and times only: it
finds the user's mistakes and returns what identifies the source. `Source.read` opens the documents.

What a document is:
- standard library, or a folder: one file;
- JSONL, Parquet, Hugging Face dataset: one row's `data.text_field`;
- in plain text, a line that is exactly `<|endoftext|>` ends a document. A single text file without
  such lines is cut at blank lines (at line ends where it has none) into pieces of about 8,192
  characters, or of a sixteenth of the file if that is less: there must be documents to hold out.

Text is UTF-8. A single file that is not is an error; such files in a folder or in the standard
library are left out and counted.
"""

import difflib
import logging
import os
import platform
import re
import sysconfig
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.paths import local_path
from configs.rules import ConfigError
from configs.schema import Data

TEXT_SUFFIXES = frozenset(
    ".txt .text .md .markdown .rst .tex .org .py .pyi .c .h .cc .cpp .hpp .cu .cuh .rs .go .java"
    " .js .ts .tsx .jl .lua .rb .sh .sql .toml .yaml .yml .html .css".split()
)
TABLE_SUFFIXES = {".jsonl": "json", ".jsonl.gz": "json", ".parquet": "parquet"}
BINARY_SUFFIXES = frozenset(
    ".gz .zip .tar .tgz .xz .bz2 .zst .7z .json .csv .tsv .arrow .pdf .doc .docx .epub .npy .bin"
    " .pt .safetensors .png .jpg .so .pyc".split()
)
SUPPORTED = "text files (.txt, .md, .py, ...), .jsonl, .jsonl.gz and .parquet"
PIECE_LENGTH = 8192  # characters
_SEPARATOR = re.compile(r"^<\|endoftext\|>[ \t]*\r?(?:\n|\Z)", re.MULTILINE)
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_ROWS = 256


class Table:
    """One text column of a `datasets.Dataset`, which stays on disk."""

    def __init__(self, rows: Any, column: str) -> None:
        self.rows, self.column = rows.select_columns(column), column

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Sequence[int]) -> list[str]:
        return [text or "" for text in self.rows[list(indices)][self.column]]


@dataclass
class Documents:
    """All documents of a source by position, in memory (files) or on disk (tables)."""

    texts: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    not_utf8: list[str] = field(default_factory=list)
    """Files left out because they are not UTF-8."""

    def __len__(self) -> int:
        return len(self.texts) + sum(map(len, self.tables))

    def __iter__(self) -> Iterator[str]:
        yield from self.texts
        for table in self.tables:
            for start in range(0, len(table), _ROWS):
                yield from table.take(range(start, min(start + _ROWS, len(table))))

    def take(self, positions: Sequence[int]) -> list[str]:
        """The documents at `positions`, in that order; one read per table."""
        starts = [0, len(self.texts)]
        for table in self.tables:
            starts.append(starts[-1] + len(table))
        wanted: dict[int, list[int]] = {}
        for position in positions:
            wanted.setdefault(bisect_right(starts, position) - 1, []).append(position)
        found: dict[int, str] = {}
        for part, members in wanted.items():
            if part == 0:
                found.update((p, self.texts[p]) for p in members)
            else:
                rows = self.tables[part - 1].take([p - starts[part] for p in members])
                found.update(zip(members, rows, strict=True))
        return [found[position] for position in positions]


@dataclass(frozen=True)
class Source:
    label: str
    """Short name for folders and logs."""
    identity: Any
    """JSON-able: changes when the documents do (for a Hugging Face dataset only its name)."""
    read: Callable[[], Documents]


def locate(data: Data) -> Source:
    """Find `data.source` without reading it. Raises ConfigError."""
    if data.source == "stdlib":
        return _stdlib(data)
    path = local_path(data.source)
    if path.is_dir():
        return _folder(data, path)
    if path.is_file():
        return _file(data, path)
    if _HUB_NAME.fullmatch(data.source) and not _looks_like_path(data.source):
        return Source(
            label=re.sub(r"[/:]", "-", data.source),
            identity=["hub", data.source],
            read=lambda: _read_hub(data),
        )
    raise _error(data, f"no such file or folder; {_near_paths(path)}")


def stdlib_root() -> Path:
    """Folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def _stdlib(data: Data) -> Source:
    root = stdlib_root()
    files = [
        file
        for file in _walk(root, skip=("site-packages", "dist-packages"))
        if file.suffix == ".py"
    ]
    sizes = [[file.relative_to(root).as_posix(), file.stat().st_size] for file in files]
    return Source(
        label="stdlib",
        identity=["stdlib", platform.python_version(), sizes],
        read=lambda: _read_files(data, files, [], split_lines=False),
    )


def _folder(data: Data, root: Path) -> Source:
    files = _walk(root, skip=())
    texts = [file for file in files if _kind(file) == "text"]
    tables = [file for file in files if _kind(file) in TABLE_SUFFIXES.values()]
    if not texts and not tables:
        suffixes = Counter(file.suffix or file.name for file in files).most_common(4)
        has = ", ".join(suffix for suffix, _ in suffixes) or "nothing"
        raise _error(data, f"no document in this folder (it has {has}); it takes {SUPPORTED}")
    return Source(
        label=root.resolve().name,
        identity=["files", [_stamp(file, root) for file in texts + tables]],
        read=lambda: _read_files(data, texts, tables, split_lines=True),
    )


def _file(data: Data, path: Path) -> Source:
    kind = _kind(path)
    if kind in TABLE_SUFFIXES.values():
        texts, tables = [], [path]
    elif path.suffix.lower() in BINARY_SUFFIXES:
        hint = "; one JSON object per line? name it .jsonl" if path.suffix == ".json" else ""
        raise _error(data, f"suffix {path.suffix} is not supported; it takes {SUPPORTED}{hint}")
    else:
        texts, tables = [path], []
    return Source(
        label=path.name.split(".")[0],
        identity=["files", [_stamp(path, path.parent)]],
        read=lambda: _read_files(data, texts, tables, split_lines=True, single=True),
    )


def _read_files(
    data: Data, texts: list[Path], tables: list[Path], *, split_lines: bool, single: bool = False
) -> Documents:
    """split_lines: `<|endoftext|>` lines end documents. single: the source is this one file."""
    documents = Documents()
    for file in texts:
        try:
            text = file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            if single:
                raise _error(
                    data, f"not UTF-8 text (byte {error.start}); it takes {SUPPORTED}"
                ) from None
            documents.not_utf8.append(str(file))
            continue
        except OSError as error:
            raise _error(data, f"{file} cannot be read: {error.strerror}") from None
        parts = _SEPARATOR.split(text) if split_lines else [text]
        if len(parts) > 1:
            documents.texts += [part for part in parts if part.strip()]
        else:
            documents.texts += cut(text) if single else parts
    for builder in ("json", "parquet"):
        chosen = [str(file.resolve()) for file in tables if _kind(file) == builder]
        if chosen:
            cache = str(local_path(data.cache_dir) / "datasets")
            rows = _load(data, builder, data_files=chosen, cache_dir=cache)
            documents.tables.append(_column(data, rows))
    return documents


def cut(text: str) -> list[str]:
    """One text as documents of at least PIECE_LENGTH (a sixteenth of it, if less); ends with the
    paragraph, or with the line where there are no paragraphs. Joined they are `text` again."""
    size = min(PIECE_LENGTH, len(text) // 16)
    for pattern in (r"\n[ \t\r]*\n\s*", r"\n"):
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


def _read_hub(data: Data) -> Documents:
    name, _, subset = data.source.partition(":")
    rows = _load(data, name, *([subset] if subset else []))
    return Documents(tables=[_column(data, rows)])


def _load(data: Data, *names: str, **options: Any) -> Any:
    """`datasets.load_dataset` of the split `train`, with errors in one line."""
    import datasets  # takes 0.9 s to import: only for the sources that need it

    datasets.disable_progress_bars()  # what goes wrong is said in one line, below
    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        return datasets.load_dataset(*names, split="train", **options)
    except Exception as error:  # the library raises many kinds; all mean that there is no data
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        if "data_files" in options:
            raise _error(data, f"cannot be read as {names[0]}: {reason[0][:300]}") from None
        raise _error(
            data,
            f"no such file or folder ({_near_paths(Path(data.source))}), and as a Hugging Face "
            f"dataset (name or name:config, split train) it cannot be loaded: {reason[0][:300]}",
        ) from None


def _column(data: Data, rows: Any) -> Table:
    key = f"data.text_field = {data.text_field!r}"
    if data.text_field not in rows.column_names:
        near = difflib.get_close_matches(data.text_field, rows.column_names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        columns = ", ".join(rows.column_names)
        raise _error(data, f"no such column ({key}); it has {columns}{hint}")
    kind = getattr(rows.features[data.text_field], "dtype", "a structure")
    if kind not in ("string", "large_string"):
        raise _error(data, f"this column holds {kind}, not text ({key})")
    return Table(rows, data.text_field)


def _kind(file: Path) -> str:
    """`text`, a builder of the `datasets` library, or nothing for a file we do not take."""
    for suffix, builder in TABLE_SUFFIXES.items():
        if file.name.lower().endswith(suffix):
            return builder
    return "text" if file.suffix.lower() in TEXT_SUFFIXES else ""


def _walk(root: Path, skip: tuple[str, ...]) -> list[Path]:
    """All files below root, sorted; without hidden ones and `__pycache__`."""
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(
            name for name in subfolders if name[0] != "." and name not in ("__pycache__", *skip)
        )
        files += [Path(folder, name) for name in sorted(names) if name[0] != "."]
    return [file for file in files if file.is_file()]


def _stamp(file: Path, root: Path) -> list[Any]:
    status = file.stat()
    return [file.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns]


def _looks_like_path(source: str) -> bool:
    """Whether a name that does not exist was meant as a path rather than a dataset on the Hub."""
    known = TEXT_SUFFIXES | BINARY_SUFFIXES | set(TABLE_SUFFIXES)
    parent = Path(source).parent
    return (
        source[0] in "./~"
        or Path(source).suffix.lower() in known
        or (parent != Path() and parent.is_dir())
    )


def _near_paths(path: Path) -> str:
    parent = path.parent
    while not parent.is_dir():
        parent = parent.parent
    names = sorted(p.name for p in parent.iterdir() if p.name[0] != ".")
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if near and parent == path.parent:
        return "did you mean " + " or ".join(str(parent / name) for name in near) + "?"
    return f"{parent.resolve()} has {', '.join(names[:5]) or 'nothing'}"


def _error(data: Data, problem: str) -> ConfigError:
    return ConfigError(f"data.source = {data.source!r}: {problem}")

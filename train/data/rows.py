"""The rows of JSON lines and Parquet files, of which only one text column is read.

A row is the text, None if the row has none, or Unreadable with place and reason. Other columns may
differ from row to row and from file to file. A file is opened by its name and read in one pass; the
memory in use is a line, or a few rows of the column.
"""

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from train.data.documents import shown

LONGEST_LINE = 2**28  # bytes
_BATCH = 64  # rows
_BLANK = re.compile(rb"(?:[ \t\r\n]|\xef\xbb\xbf)*")
"""White space of JSON and byte-order marks, of which concatenated files have several."""
_MOST_NAMES = 100


@dataclass(frozen=True)
class Unreadable:
    """A row, or the rest of a file, that cannot be read."""

    where: str
    why: str
    not_utf8: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.why}"


Row = str | None | Unreadable


@dataclass
class Column:
    """The requested text column, and where it was found or missing."""

    name: str
    found: bool = False
    """Whether any row of the file had it."""
    missed: bool = False
    """Whether any row of the file lacked it."""
    others: dict[str, None] = field(default_factory=dict)
    """Names of the columns of rows without it."""

    def miss(self, names: Iterable[str]) -> None:
        """Record the columns of a row, or of a whole file, without this one."""
        self.missed = True
        for name in names:
            if len(self.others) >= _MOST_NAMES:
                return
            self.others[name] = None


class WrongColumn(Exception):
    """A whole file whose text column is not text, with the reason."""


def json_rows(path: Path, column: Column) -> Iterator[Row]:
    """The rows of a file of JSON lines, compressed if its name ends in .gz or .zst.

    Blank lines and a byte-order mark are skipped.
    """
    raw = _open(path)
    if isinstance(raw, Unreadable):
        yield raw
        return
    with raw:
        file = _decompressed(raw, path.name.lower())
        number = 0
        while True:
            number += 1
            try:
                line = file.readline(LONGEST_LINE + 1)
                too_long = len(line) > LONGEST_LINE
                while too_long and not line.endswith(b"\n") and line:
                    line = file.readline(2**20)
            except (OSError, EOFError, zlib.error) as error:
                why = getattr(error, "strerror", None) or str(error)
                yield Unreadable(f"line {number} and all that follow", why)
                return
            if too_long:
                yield Unreadable(f"line {number}", f"longer than {LONGEST_LINE:,} bytes")
            elif not line:
                return
            elif line := line[_end_of_blank(line) :]:
                yield _json_row(line, f"line {number}", column)


def _decompressed(raw: BinaryIO, name: str) -> BinaryIO | gzip.GzipFile | io.BufferedReader:
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if name.endswith(".zst"):
        import pyarrow as pa

        stream = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
        return io.BufferedReader(stream, 2**20)
    return raw


def json_rows_between(path: Path, column: Column, start: int, end: int) -> Iterator[Row]:
    """The rows of the lines that begin at the byte offsets `start` to `end - 1`, uncompressed.

    As `json_rows`, but an unreadable row is named by its byte offset.
    """
    raw = _open(path)
    if isinstance(raw, Unreadable):
        yield raw
        return
    with raw:
        if start:  # the line that begins before it belongs to the range before
            raw.seek(start - 1)
            while (part := raw.readline(2**20)) and not part.endswith(b"\n"):
                pass
        while (place := raw.tell()) < end:
            try:
                line = raw.readline(LONGEST_LINE + 1)
                too_long = len(line) > LONGEST_LINE
                while too_long and not line.endswith(b"\n") and line:
                    line = raw.readline(2**20)
            except OSError as error:
                yield Unreadable(f"byte offset {place:,} and all that follows", str(error.strerror))
                return
            if too_long:
                yield Unreadable(f"byte offset {place:,}", f"longer than {LONGEST_LINE:,} bytes")
            elif not line:
                return
            elif line := line[_end_of_blank(line) :]:
                yield _json_row(line, f"byte offset {place:,}", column)


def _end_of_blank(line: bytes) -> int:
    blank = _BLANK.match(line)
    return blank.end() if blank else 0


def _json_row(line: bytes, where: str, column: Column) -> Row:
    try:
        # numbers are not used: those of more than 4,300 digits are no int in Python
        row = json.loads(line.decode(), parse_int=float)
    except UnicodeDecodeError as error:
        return Unreadable(where, f"not UTF-8 (byte {error.start + 1})", not_utf8=True)
    except json.JSONDecodeError as error:
        why = f"not JSON: {error.msg} (character {error.pos + 1})"
        if b"\r{" in line:
            why += "; lines must end in LF or CR LF, not in CR alone"
        return Unreadable(where, why)
    except RecursionError:
        return Unreadable(where, "nested too deep")
    if not isinstance(row, dict):
        return Unreadable(where, f"{_json_type(row)}, not an object")
    if column.name not in row:
        column.miss(row)
        return None
    column.found = True
    text = row[column.name]
    if text is None:
        return None
    if not isinstance(text, str):
        return Unreadable(where, f"{shown(column.name, 100)!r} holds {_json_type(text)}, not text")
    return _checked(text, where)


def _json_type(value: Any) -> str:
    names: dict[type, str] = {
        list: "a list", dict: "an object", str: "a string", bool: "true or false", float: "a number"
    }  # fmt: skip
    return names.get(type(value), "null")


def _checked(text: str, where: str) -> Row:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return Unreadable(where, f"half of a surrogate pair (character {error.start + 1})")
    return text


def parquet_rows(path: Path, column: Column, groups: Sequence[int] | None = None) -> Iterator[Row]:
    """The rows of a Parquet file, or of some of its row groups. Raises WrongColumn."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number, raw = 0, _open(path)
    if isinstance(raw, Unreadable):
        yield raw
        return
    with raw:
        try:
            # opened here, because pyarrow interprets some names
            file = pq.ParquetFile(raw, pre_buffer=False, buffer_size=2**20)
            schema, n_rows = file.schema_arrow, file.metadata.num_rows
            if groups:
                number = sum(file.metadata.row_group(i).num_rows for i in range(groups[0]))
        except (pa.ArrowException, OSError, ValueError) as error:
            yield Unreadable("the whole file", f"not readable as Parquet: {_reason(error)}")
            return
        if column.name not in schema.names:
            if n_rows:
                column.miss(schema.names)
            return
        check_text(schema, column)
        try:
            for batch in file.iter_batches(
                _BATCH, row_groups=groups, columns=[column.name], use_threads=False
            ):
                values = batch.column(batch.schema.get_field_index(column.name))
                for row in texts_of(values, number):
                    yield row
                    number += 1
        except (pa.ArrowException, OSError, ValueError) as error:
            yield Unreadable(f"row {number + 1} and all that follow", _reason(error))


def _open(path: Path) -> BinaryIO | Unreadable:
    try:
        return open(path, "rb")
    except OSError as error:
        return Unreadable("the whole file", error.strerror or str(error))


def check_text(schema: Any, column: Column) -> None:
    """Raise WrongColumn if the column of an Arrow schema is not text."""
    import pyarrow as pa

    if schema.names.count(column.name) > 1:
        raise WrongColumn("there are two columns of this name")
    column.found = True
    kind = schema.field(column.name).type
    while not pa.types.is_null(kind):
        if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
            kind = kind.value_type
        elif isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
            return
        elif pa.types.is_string_view(kind):
            return
        else:
            raise WrongColumn(f"this column holds {schema.field(column.name).type}, not text")


def texts_of(values: Any, before: int) -> list[Row]:
    """The rows of an Arrow array of text. before: number of earlier rows, for errors."""
    try:
        rows = values.to_pylist()
    except UnicodeDecodeError:
        rows = [_text_of(value, f"row {before + i}") for i, value in enumerate(values, start=1)]
    return rows


def _text_of(value: Any, where: str) -> Row:
    try:
        text: str | None = value.as_py()
        return text
    except UnicodeDecodeError as error:
        return Unreadable(where, f"not UTF-8 (byte {error.start + 1})", not_utf8=True)


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]

"""The documents of a unit, always the same ones in the same order.

Each is its text, or the reason why it has none: Rejected counts and, if it is an error, describes
it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from configs.errors import UserError
from train.data.documents import shown
from train.data.hf_stream import open_rows, reason_of, text_of
from train.data.rows import (
    Column,
    Row,
    Unreadable,
    WrongColumn,
    check_text,
    json_rows,
    json_rows_between,
    parquet_rows,
    texts_of,
)
from train.data.sources import SEPARATOR, cut, decoded
from train.prepare.inputs import Unit, load_rows

EMPTY, MISSING, UNREADABLE, NOT_UTF8 = "empty", "missing", "unreadable", "not_utf8"
REJECTIONS = (EMPTY, MISSING, UNREADABLE, NOT_UTF8)


@dataclass(frozen=True)
class Rejected:
    """A document without text: `missing` for a row without the column or with null in it."""

    why: str
    where: str = ""


def documents_of(unit: Unit, column: Column) -> Iterator[str | Rejected]:
    """The documents of a unit. `column` notes where it was found. Raises UserError for a column
    that is no text."""
    if unit.kind == "texts":
        for name in unit.files:
            yield from _text_file(Path(name), single=False)
    elif unit.kind == "text":
        yield from _text_file(Path(unit.files[0]), single=True)
    else:
        yield from _table(unit, column)


def _text_file(path: Path, *, single: bool) -> Iterator[str | Rejected]:
    """single: the source is this one file, which is cut into documents."""
    try:
        text = decoded(path.read_bytes())
    except UnicodeDecodeError as error:
        yield Rejected(NOT_UTF8, f"{shown(path)}: byte offset {error.start:,}: {error.reason}")
        return
    except OSError as error:
        yield Rejected(UNREADABLE, f"{shown(path)}: {error.strerror}")
        return
    parts = SEPARATOR.split(text)
    if len(parts) > 1:
        parts = [part for part in parts if part.strip()]
    elif single:
        parts = cut(text)
    for part in parts:
        yield part if part.strip() else Rejected(EMPTY)


def _table(unit: Unit, column: Column) -> Iterator[str | Rejected]:
    name = shown(unit.files[0])
    empty = True
    try:
        for row in _rows(unit, column):
            empty = False
            if row is None:
                yield Rejected(MISSING)
            elif isinstance(row, Unreadable):
                yield Rejected(NOT_UTF8 if row.not_utf8 else UNREADABLE, f"{name}: {row}")
            else:
                yield row if row.strip() else Rejected(EMPTY)
        if empty and column.missed:  # no column, so no rows were read
            others = ", ".join(shown(other, 50) for other in list(column.others)[:10])
            yield Rejected(
                UNREADABLE,
                f"{name}: has no column {column.name!r} (--text-field), but {others}",
            )
    except WrongColumn as error:
        raise UserError(f"{name}: {error} (--text-field {shown(column.name, 100)})") from None


def _rows(unit: Unit, column: Column) -> Iterator[Row]:
    path = Path(unit.files[0])
    if unit.kind == "json":
        yield from json_rows_between(path, column, unit.start, unit.end)
    elif unit.kind == "compressed":
        yield from json_rows(path, column)
    elif unit.kind == "parquet":
        groups = list(range(unit.start, unit.end))
        yield from parquet_rows(path, column, groups or None)
    elif unit.kind == "stream":
        yield from _streamed_rows(unit, column)
    else:
        yield from _arrow_rows(unit, column)


def _arrow_rows(unit: Unit, column: Column) -> Iterator[Row]:
    table = _loaded(unit.kind, unit.files[0])
    schema = table.features.arrow_schema
    if column.name not in schema.names:
        column.miss(schema.names)
        return
    check_text(schema, column)
    rows = table.select_columns(column.name).with_format("arrow")
    for start in range(unit.start, unit.end, 1000):
        part = rows[start : min(start + 1000, unit.end)].column(0)
        for chunk in part.chunks:
            for row in texts_of(chunk, start):
                yield row
                start += 1


def _streamed_rows(unit: Unit, column: Column) -> Iterator[Row]:
    """The rows of one file of a stream."""
    rows = open_rows(unit.files[0])
    rows = rows.shard(num_shards=rows.num_shards, index=unit.start)
    iterator, number = iter(rows), 0
    while True:
        number += 1
        where = f"file {unit.start + 1}, row {number}"
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # of the file format, the disk, the network
            yield Unreadable(f"{where} and all that follow", reason_of(error))
            return
        if column.name not in row:
            column.miss(row)
            yield None
            continue
        column.found = True
        try:
            yield text_of(row, column.name, where) or None
        except UserError as error:
            yield Unreadable(where, str(error).removeprefix(f"{where}: "))


@cache
def _loaded(kind: str, name: str) -> Any:
    return load_rows(kind, name)

"""Hugging Face datasets that are read as a stream, without a download of the whole.

A source `stream:NAME` or `stream:NAME:CONFIG` is the split `train` of a dataset of the Hub;
`stream:PATH` is a local folder or file of the kinds that `datasets.load_dataset` reads. The rows
have a fixed order, that of the dataset's files; the library's state is the place to continue at.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.paths import local_path
from train.data.documents import shown

PREFIX = "stream:"
_LOADERS = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".gz": "json", ".zst": "json",
    ".parquet": "parquet", ".arrow": "arrow", ".txt": "text", ".csv": "csv",
}  # fmt: skip
_BATCH = 64  # rows: the library needs as long for a batch as for one
_NEEDED = "datasets>=4.0,<4.8"


def is_stream(setting: str) -> bool:
    """Whether a source is to be streamed."""
    return setting.startswith(PREFIX)


def find_stream(setting: str) -> Path:
    """The path of a source `stream:...`, which need not exist if it is a name of the Hub. Raises
    UserError."""
    name = setting.removeprefix(PREFIX)
    path = local_path(name) if name else Path()
    if not name or (name[0] in "./~" and not path.exists()):
        raise UserError(
            f"{shown(setting)}: no such file or folder; name one, or NAME[:CONFIG] of the Hub"
        )
    return path


def open_rows(setting: str) -> Any:
    """The `IterableDataset` of a source `stream:...`. Raises UserError."""
    name = setting.removeprefix(PREFIX)
    try:
        import datasets  # takes 0.9 s to import: only for the sources that need it
    except ImportError:
        raise UserError(
            f"{shown(setting)}: needs the package datasets: pip install '{_NEEDED}'"
        ) from None
    datasets.disable_progress_bars()  # errors are reported in one line, below
    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    path = find_stream(setting)
    try:
        if path.is_file():
            loader = _LOADERS.get(path.suffix.lower(), "text")
            return datasets.load_dataset(
                loader, data_files=str(path), split="train", streaming=True
            )
        if path.is_dir():
            return datasets.load_dataset(str(path), split="train", streaming=True)
        dataset, _, subset = name.partition(":")
        given = [subset] if subset else []
        return datasets.load_dataset(dataset, *given, split="train", streaming=True)
    except Exception as error:  # the library raises many types; all mean that there is no data
        raise UserError(f"{shown(setting)}: cannot be streamed: {reason_of(error)}") from None


def text_of(row: dict[str, Any], column: str, place: str) -> str:
    """The text of a row of a stream; empty for null.

    place: of the row, for errors. Raises UserError.
    """
    if column not in row:
        names = ", ".join(shown(name, 50) for name in list(row)[:10])
        raise UserError(f"{place}: no column {shown(column, 100)!r}; it has {names or 'none'}")
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        kind = type(text).__name__
        raise UserError(f"{place}: the column {shown(column, 100)!r} holds {kind}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: half of a surrogate pair (character {error.start + 1})"
        ) from None
    return text


class StreamedDocuments:
    """The documents of a stream, again from its beginning when it ends, and the place of the
    next one."""

    def __init__(self, setting: str, column: str, log: Callable[[str], None]) -> None:
        """log: called with a line when 1, 2, 4, 8, ... rows had no text."""
        self.setting, self.column, self.log = setting, column, log
        self._rows = open_rows(setting)
        self._batches: Iterator[dict[str, list[Any]]] | None = None
        self.number = 0
        """Rows read, over all epochs."""
        self.epoch = 0
        self.n_empty = 0
        """Of these, rows with null or white space."""
        self._first = 0  # number of the epoch's first row
        self._batch: dict[str, list[Any]] = {}
        self._at = self._size = 0  # rows read of the batch, rows in it
        self._before = self._rows.state_dict()  # the library's state before the batch

    def state(self) -> dict[str, Any]:
        """Where the next row is; JSON."""
        return {
            "rows": self._before, "of_batch": self._at, "number": self.number,
            "epoch": self.epoch, "first": self._first, "empty": self.n_empty,
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Continue at a state. Raises UserError if it is of another dataset."""
        try:
            self._rows = open_rows(self.setting)
            self._rows.load_state_dict(copy.deepcopy(state["rows"]))
            self._before, at = state["rows"], int(state["of_batch"])
            self.number, self.epoch = int(state["number"]), int(state["epoch"])
            self._first, self.n_empty = int(state["first"]), int(state["empty"])
        except UserError:
            raise
        except Exception as error:  # the library's checks differ by type of file
            raise self._other(reason_of(error)) from None
        self._batches, self._at, self._size = None, 0, 0
        if at:
            if not self._read() or self._size < at:
                raise self._other("it has fewer rows")
            self._at = at

    def _other(self, why: str) -> UserError:
        return UserError(
            f"{shown(self.setting)}: is not the stream that the checkpoint has read: {why}"
        )

    def next(self) -> str:
        """The text of the next row that has one. Raises UserError."""
        while True:
            row = self._row()
            self.number += 1
            place = f"{shown(self.setting)}: row {self.number - self._first:,}"
            text = text_of(row, self.column, place)
            if text.strip():
                return text
            self.n_empty += 1
            if not self.n_empty & (self.n_empty - 1):
                self.log(f"data: {shown(self.setting)}: {self.n_empty:,} rows without text so far")
            if self.n_empty == self.number and self.epoch:
                raise UserError(f"{shown(self.setting)}: no row has text")

    def _row(self) -> dict[str, Any]:
        """The next row, after the last one the first."""
        while self._at == self._size:
            if self._read():
                continue
            if self.number == self._first:
                raise UserError(f"{shown(self.setting)}: has no rows")
            self._rows, self._batches = open_rows(self.setting), None  # from its beginning
            self._before = self._rows.state_dict()
            self.epoch, self._first = self.epoch + 1, self.number
        self._at += 1
        return {name: column[self._at - 1] for name, column in self._batch.items()}

    def _read(self) -> bool:
        """Read a batch; False at the end."""
        if self._batches is None:
            self._batches = self._rows.iter(_BATCH)
        else:
            self._before = self._rows.state_dict()
        try:
            self._batch = next(self._batches)
        except StopIteration:
            self._at = self._size = 0
            return False
        except Exception as error:  # of the file format, the disk, the network
            raise UserError(
                f"{shown(self.setting)}: the rows after row {self.number - self._first:,} cannot "
                f"be read: {reason_of(error)}"
            ) from None
        self._at, self._size = 0, max(map(len, self._batch.values()), default=0)
        return True


def reason_of(error: BaseException) -> str:
    """The first line of an error of the library, or of its cause."""
    text = str(error.__cause__ or error).strip() or type(error).__name__
    return text.splitlines()[0][:300]

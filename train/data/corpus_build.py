"""Builds the files of one corpus: reads, deduplicates, splits and tokenizes the source.

The stream: every document is `<|endoftext|>` and then its tokens. The token begins a document, and
is the target of the last token of the previous document. Documents are in the order of their
content hash: a shuffle without a seed, in which adjacent documents are unrelated and which does
not change the order of documents when others are added.

The split is by document, after deduplication: a document is held out if its hash, read as a number
in [0, 1), is below `validation_fraction`. So a document stays in its split as the corpus grows. The
tokenizer is trained on training documents only.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from configs.schema import JobConfig
from train.data.dedup import DedupResult, find_duplicates, split
from train.data.documents import Documents, shown
from train.data.progress import reported
from train.data.sources import Source
from train.tokenizer.hf_files import kept_settings
from train.tokenizer.tokenizer import (
    Encoder,
    check_vocab_size,
    find_tokenizer,
    load_tokenizer,
    train_tokenizer,
)

Log = Callable[[str], None]
FILES = ("tokenizer.json", "tokenizer_config.json", "train.npy", "validation.npy")
_CHUNK_BYTES = 4 * 2**20  # text in memory at once, except for the one document that exceeds it


def build(config: JobConfig, source: Source, work: Path, log: Log) -> dict[str, Any]:
    """Write FILES into the empty folder `work`; returns their entries of the manifest."""
    data, vocab_size = config.data, config.model.vocab_size
    check_vocab_size(vocab_size)
    given = find_tokenizer(data.tokenizer) if data.tokenizer else None
    if given:
        load_tokenizer(given, vocab_size)  # checked before the corpus is read
    log(f"corpus: reading {shown(data.source)}")
    with source.read(work, log) as documents:
        return _build(config, documents, given, work, log)


def _build(
    config: JobConfig, documents: Documents, given: Path | None, work: Path, log: Log
) -> dict[str, Any]:
    data, vocab_size = config.data, config.model.vocab_size
    found = find_duplicates(documents, data.near_duplicate_threshold, log)
    _report(config, documents, found, log)
    held_out = split(found.digests, data.validation_fraction)
    rows = {"train": np.flatnonzero(~held_out), "validation": np.flatnonzero(held_out)}

    file = work / "tokenizer.json"
    if given:
        file.write_bytes(given.read_bytes())
    else:
        trained = train_tokenizer(lambda: _texts(documents, found, rows["train"]), vocab_size, log)
        # not with the library's save, which raises no OSError for a full disk
        file.write_text(trained.to_str(pretty=True), "utf-8")
    tokenizer, eot_token = load_tokenizer(given or file, vocab_size)
    kept = kept_settings(given or file, eot_token)
    (work / "tokenizer_config.json").write_text(json.dumps(kept), "utf-8")
    eot = tokenizer.token_to_id(eot_token)
    assert eot is not None
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
    encoder = Encoder(tokenizer, eot, dtype)
    tokens = {
        part: _encode(_chunks(documents, found, rows[part]), encoder, work / f"{part}.npy", log)
        for part in rows
    }
    return {
        "settings": asdict(data) | {"vocab_size": vocab_size},
        "documents": {
            "read": len(documents),
            "empty": found.n_empty,
            "exact_duplicates": found.n_exact,
            "near_duplicates": found.n_near,
            **{part: len(rows[part]) for part in rows},
        },
        "files_not_utf8": documents.not_utf8,
        "rows_unreadable": {
            "count": documents.n_unreadable_rows,
            "first": documents.unreadable_rows,
        },
        "bytes": {part: sum(found.sizes[row] for row in rows[part]) for part in rows},
        "tokens": tokens,
        "dtype": dtype.name,
        "eot": eot,
        "eot_token": eot_token,
    }


def _report(config: JobConfig, documents: Documents, found: DedupResult, log: Log) -> None:
    """Log what was read and dropped. Raises UserError if too little remains."""
    if documents.not_utf8:
        example = documents.not_utf8[0]
        log(f"corpus: left out {len(documents.not_utf8)} files that are not UTF-8, as {example}")
    if documents.n_unreadable_rows:
        rows = f"{documents.n_unreadable_rows:,} rows that cannot be read"
        log(f"corpus: left out {rows}, as {documents.unreadable_rows[0]}")
    for note in documents.notes:
        log(f"corpus: {note}")
    dropped = f"{found.n_empty} empty, {found.n_exact} equal, {found.n_near} nearly equal to others"
    log(
        f"corpus: {len(documents):,} documents, dropped {dropped}; "
        f"{len(found.kept):,} left ({sum(found.sizes) / 1e6:.3g} MB)"
    )
    if len(found.kept) < 2:
        what = "there is no text in it"
        if found.kept:
            what = f"1 of {len(documents)} documents left ({dropped})"
        raise UserError(
            f"data.source = {config.data.source!r}: {what}; it takes two documents or more, "
            "one to train on and one to hold out"
        )


def _chunks(documents: Documents, found: DedupResult, rows: np.ndarray) -> Iterator[list[str]]:
    """The documents of `rows` in order, a few MiB at a time."""
    chunk: list[int] = []
    size = 0
    for row in rows:
        chunk.append(found.kept[row])
        size += found.sizes[row]
        if size >= _CHUNK_BYTES:
            yield documents.take(chunk)
            chunk, size = [], 0
    if chunk:
        yield documents.take(chunk)


def _texts(documents: Documents, found: DedupResult, rows: np.ndarray) -> Iterator[str]:
    for chunk in _chunks(documents, found, rows):
        yield from chunk


def _encode(chunks: Iterator[list[str]], encoder: Encoder, path: Path, log: Log) -> int:
    """Write the stream of all chunks as one array file; returns its length in tokens."""
    length = n_documents = 0

    def line(done: int) -> str:
        return f"{path.stem}: {n_documents:,} documents, {length:,} tokens so far"

    with open(path, "wb") as file:
        _write_header(file, 0, encoder.dtype)
        start = file.tell()
        for chunk in reported(chunks, log, line):
            stream = encoder.encode(chunk)
            file.write(stream.data)
            length += len(stream)
            n_documents += len(chunk)
        # numpy pads the header for a growing length, so the final one fits over the first.
        file.seek(0)
        _write_header(file, length, encoder.dtype)
        assert file.tell() == start, "the .npy header changed its size"
    log(f"{path.stem}: {n_documents:,} documents, {length:,} tokens")
    return length


def _write_header(file: Any, length: int, dtype: np.dtype) -> None:
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(
        file, {"descr": descr, "fortran_order": False, "shape": (length,)}
    )

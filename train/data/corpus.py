"""Token arrays of `data.source` on disk: the entry point and the cache.

A corpus is a folder, written once and found by a hash of everything that determines its content:
`<cache_dir>/<source>-<key>` with train.npy, validation.npy, the tokenizer and a manifest
(`train.data.corpus_build` creates them and describes the token stream). It is built under a
temporary name, fsynced and renamed: a killed process leaves no incomplete corpus, and if two
processes build it at the same time the later one uses the folder of the earlier one.

The manifest contains the size of every file and the CRC-32 of its first and last MiB, checked
whenever the corpus is opened: enough to detect a truncated, replaced or zeroed file of any size.
"""

import hashlib
import importlib.metadata
import json
import re
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from configs.paths import local_path
from configs.schema import JobConfig
from train.atomic_files import naming, sync
from train.data import sources
from train.data.corpus_build import FILES, build
from train.data.documents import shown
from train.tokenizer.hf_files import files_beside
from train.tokenizer.tokenizer import BOUNDARIES, WORDS, find_tokenizer

FORMAT = 2
_MIB = 2**20
_ABANDONED_SECONDS = 24 * 3600


class DamagedCache(ValueError):
    """A corpus folder whose files do not match its manifest."""


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus, opened. T tokens."""

    folder: Path
    train: np.ndarray
    """Token ids `[T]`, uint16 or uint32, memory-mapped."""
    validation: np.ndarray
    """Token ids of the held-out documents, as `train`."""
    train_bytes: int
    """UTF-8 bytes of the text of `train`."""
    validation_bytes: int
    """UTF-8 bytes of the text of `validation`."""
    eot: int
    """Id of the end-of-text token, which begins every document."""
    tokenizer_file: Path
    """The tokenizer.json that produced the tokens."""
    fingerprint: str
    """Hash of the tokens and the tokenizer: equal for the same data."""


def prepare(config: JobConfig, log: Callable[[str], None]) -> Corpus:
    """The corpus of `config.data`, built if the cache does not contain it.

    One process calls it; the others call `open_corpus` afterwards. log: called with lines of
    progress. Raises UserError, one line for the user, if source or settings are invalid.
    """
    source = sources.locate(config.data)
    cache = local_path(config.data.cache_dir)
    label = re.sub(r"[^\w.-]+", "-", source.label).strip("-.")[:40] or "corpus"
    folder = cache / f"{label}-{_key(config, source)}"
    with _blaming(cache):
        return _find_or_build(config, source, folder, log)


def _find_or_build(
    config: JobConfig, source: sources.Source, folder: Path, log: Callable[[str], None]
) -> Corpus:
    try:
        corpus = open_corpus(folder)
        log(f"corpus: {shown(folder)}, {len(corpus.train):,} training tokens (cached)")
        return corpus
    except FileNotFoundError:
        pass
    except DamagedCache as error:
        log(f"corpus: {shown(str(error))}; building it again")
    work = folder.with_name(f".building-{uuid.uuid4().hex}")
    work.mkdir(parents=True)
    try:
        _remove_abandoned(work.parent)
        manifest = build(config, source, work, log)
        _write_manifest(work, manifest)
        _publish(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return open_corpus(folder)


@contextmanager
def _blaming(cache: Path) -> Iterator[None]:
    """Convert errors of writing below `cache` to UserErrors with its name."""
    try:
        with naming(cache):
            yield
    except OSError as error:
        file = Path(error.filename)
        if not (file.is_relative_to(cache) or cache.is_relative_to(file)):
            raise  # an existing tokenizer that cannot be read
        place = "" if file == cache else f"{shown(file)}: "
        raise UserError(
            f"data.cache_dir = {str(cache)!r}: cannot be used: {place}{error.strerror}"
        ) from None
    except ValueError as error:
        if "\0" not in str(cache):
            raise
        raise UserError(f"data.cache_dir = {str(cache)!r}: {error}") from None


def open_corpus(folder: Path) -> Corpus:
    """Open a prepared corpus.

    Raises FileNotFoundError if there is no such folder, DamagedCache if its files are not those
    that were written.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such corpus; data.cache_dir must be the same folder on every host"
        )
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        if manifest["format"] != FORMAT or set(manifest["files"]) != set(FILES):
            raise DamagedCache(f"{folder}: manifest of another format")
        for name, stamp in manifest["files"].items():
            if _stamp(folder / name) != stamp:
                raise DamagedCache(f"{folder}: {name} is not the file that was written")
        train, validation = (
            np.load(folder / f"{part}.npy", mmap_mode="r", allow_pickle=False)
            for part in ("train", "validation")
        )
        return Corpus(
            folder=folder,
            train=train,
            validation=validation,
            train_bytes=manifest["bytes"]["train"],
            validation_bytes=manifest["bytes"]["validation"],
            eot=manifest["eot"],
            tokenizer_file=folder / "tokenizer.json",
            fingerprint=manifest["fingerprint"],
        )
    except DamagedCache:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCache(f"{folder}: {type(error).__name__}: {error}") from None


def _key(config: JobConfig, source: sources.Source) -> str:
    """Hash of everything that determines the content of the corpus folder."""
    data = config.data
    tokenizer = WORDS
    if data.tokenizer:
        files = files_beside(find_tokenizer(data.tokenizer))
        contents = b"\0".join(file.read_bytes() for file in files)
        tokenizer = f"{hashlib.sha256(contents).hexdigest()} {BOUNDARIES}"
    parts = [
        FORMAT,
        source.identity,
        data.text_field,
        data.validation_fraction,
        data.near_duplicate_threshold,
        tokenizer,
        config.model.vocab_size,
        importlib.metadata.version("tokenizers"),
    ]
    if data.unreadable_rows != "refuse":  # irrelevant there: no rows are skipped
        parts.append(data.unreadable_rows)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _write_manifest(work: Path, manifest: dict[str, Any]) -> None:
    """Complete the manifest, write it, and make everything in `work` durable."""
    whole = hashlib.sha256()
    for name in ("tokenizer.json", "train.npy", "validation.npy"):
        with open(work / name, "rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    manifest = {"format": FORMAT, "fingerprint": whole.hexdigest()} | manifest
    manifest["files"] = {name: _stamp(work / name) for name in FILES}
    (work / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
    for path in (*work.iterdir(), work):
        sync(path)


def _publish(work: Path, folder: Path) -> None:
    """Rename `work` to `folder`. A sound corpus that exists is kept; a damaged one is replaced."""
    while True:
        try:
            work.rename(folder)
            sync(folder.parent)
            return
        except OSError:  # a folder that is not empty has this name
            if not folder.is_dir():
                raise
        try:
            open_corpus(folder)
            return
        except (DamagedCache, FileNotFoundError):
            aside = folder.with_name(f".building-{uuid.uuid4().hex}")
            try:
                folder.rename(aside)
            except FileNotFoundError:
                continue  # another process was faster
            shutil.rmtree(aside, ignore_errors=True)


def _remove_abandoned(cache: Path) -> None:
    """Delete leftovers of processes that were killed long ago."""
    for leftover in cache.glob(".building-*"):
        try:
            if time.time() - leftover.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)
        except FileNotFoundError:
            pass


def _stamp(path: Path) -> list[int]:
    """Size in bytes, and CRC-32 of the first and the last MiB."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        crc = zlib.crc32(file.read(_MIB))
        file.seek(max(size - _MIB, 0))
        return [size, zlib.crc32(file.read(_MIB), crc)]

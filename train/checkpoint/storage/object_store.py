"""Checkpoints in an object store, through fsspec (`s3://bucket/folder`, `gs://`, `abfs://`).

An object store has no rename. An object is complete once it is visible, and the manifest is written
last: a prefix without `manifest.json` is incomplete or was set aside, and loaders ignore it. The
store keeps its own checksums, so a checkpoint counts as sound for retention if its manifest and the
sizes of its files are right; when it is loaded, every byte is compared.
"""

import json
import posixpath
import zlib
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from train.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    Manifest,
    Unavailable,
    parse_manifest,
)
from train.checkpoint.manifest_content import FOLDER_NAME, short, step_of
from train.checkpoint.storage.base import Signature, Storage, pieces

_ASIDE = "damaged-manifest.json"
"""Name of the manifest of a checkpoint that was set aside."""
_MOST_DAMAGED = 2
_MOST_MANIFEST_BYTES = 2**30
_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "az": "adlfs",
}
"""Package of each protocol that fsspec itself does not implement."""


class ObjectStorage(Storage):
    """The prefix `url` of a run's checkpoints."""

    is_remote = True

    def __init__(self, url: str) -> None:
        protocol = url.partition("://")[0]
        self.url, self.is_private = url.rstrip("/"), protocol == "memory"
        package = _PACKAGES.get(protocol, "fsspec")
        try:
            from fsspec.core import url_to_fs

            self._fs, self._root = url_to_fs(self.url)
        except ImportError:
            raise CheckpointError(
                f"{url}: needs the package {package}: pip install {package}"
            ) from None
        except ValueError as error:  # an unknown protocol
            raise CheckpointError(f"{url}: {short(str(error), 300)}") from None

    def address(self, name: str = "") -> str:
        return f"{self.url}/{name}" if name else self.url

    def check(self) -> None:
        probe = self._path(".probe")
        with _one_line(self.url, "cannot be written"):
            self._fs.pipe_file(probe, b"")
            self._fs.rm_file(probe)

    def names(self) -> list[str]:
        return [name for name, files in self._folders().items() if MANIFEST in files]

    def begin(self, name: str, needed: int) -> str:
        with _one_line(self.url, "cannot be written"):
            found = self._folders()
            if MANIFEST in found.get(name, {}) and not self.faults(name, 0, 1):
                raise CheckpointError("it exists already")
            aside = [other for other, files in found.items() if _ASIDE in files]
            for other, files in found.items():
                is_old = _ASIDE in files and other in aside[:-_MOST_DAMAGED]
                if other == name or is_old or not {MANIFEST, _ASIDE} & files.keys():
                    self._delete(other)
        self._abort_uploads()
        return name

    def write(
        self, partial: str, file: str, blocks: Iterable[Any]
    ) -> Generator[None, None, dict[str, int]]:
        path, size, crc = self._path(partial, file), 0, 0
        with _one_line(f"{self.url}/{partial}/{file}", "cannot be written"):
            with self._fs.open(path, "wb") as out:
                for piece in pieces(blocks):
                    crc = zlib.crc32(piece, crc)
                    size += len(piece)
                    out.write(piece)
                    yield
            self._fs.invalidate_cache()
            if (stored := self._fs.info(path)["size"]) != size:
                raise CheckpointError(f"{size} bytes were written, {stored} are stored")
        return {"bytes": size, "crc32": crc}

    def commit(self, partial: str, name: str, manifest: str) -> Signature:
        with _one_line(self.address(name), "cannot be written"):
            self._fs.pipe_file(self._path(name, MANIFEST), manifest.encode())
            return self.signature(name)

    def discard(self, partial: str) -> None:
        self._delete(partial)

    def older(self, name: str) -> list[list[Any]]:
        found = {
            other: files
            for other, files in self._folders().items()
            if MANIFEST in files and step_of(Path(other)) < step_of(Path(name))
        }
        return [[other, _signature(files)] for other, files in reversed(found.items())]

    def faults(self, name: str, rank: int, world: int) -> dict[str, str]:
        if rank:
            return {}
        try:
            self.read_manifest(name)
        except CheckpointError as error:
            return {MANIFEST: str(error)}
        return {}

    def read_manifest(self, name: str) -> Manifest:
        path, address = self._path(name, MANIFEST), self.address(name)
        with _one_line(address, "cannot be read", Unavailable):
            files = self._folders().get(name, {})
            if MANIFEST not in files:
                raise CheckpointError(f"{address}/{MANIFEST}: missing")
            if files[MANIFEST]["size"] > _MOST_MANIFEST_BYTES:
                raise CheckpointError(f"{address}/{MANIFEST}: too large")
            raw = self._fs.cat_file(path)
        try:
            manifest = parse_manifest(raw.decode(), Path(name))
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{address}/{MANIFEST}: unreadable: {error.reason}") from None
        for file, facts in manifest.files.items():
            size = files[file]["size"] if file in files else None
            if size != facts["bytes"]:
                found = "missing" if size is None else f"{size} bytes, expected {facts['bytes']}"
                raise CheckpointError(f"{address}/{short(file)}: {found}")
        return manifest

    def fetch(self, name: str, files: Iterable[str], folder: Path) -> None:
        for file in files:
            with _one_line(f"{self.address(name)}/{file}", "cannot be read", Unavailable):
                self._fs.get_file(self._path(name, file), str(folder / file))

    def remove(self, names: list[str]) -> list[str]:
        lines = []
        for name in names:
            try:
                with _one_line(self.address(name), "cannot be removed"):
                    self._fs.rm_file(self._path(name, MANIFEST))
                    self._delete(name)
            except CheckpointError as error:
                lines.append(str(error))
        return lines

    def set_aside(self, name: str) -> str:
        address = self.address(name)
        try:
            with _one_line(address, "cannot be set aside"):
                self._fs.mv(self._path(name, MANIFEST), self._path(name, _ASIDE))
        except CheckpointError as error:
            return str(error)
        return f"{address}: its manifest is renamed to {_ASIDE}"

    def signature(self, name: str) -> Signature:
        return _signature(self._folders()[name])

    def _folders(self) -> dict[str, dict[str, dict[str, Any]]]:
        """The files of every step's prefix, by name; oldest first."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.find(self._root, maxdepth=2, detail=True)
        except FileNotFoundError:
            return {}
        folders: dict[str, dict[str, dict[str, Any]]] = {}
        for path, facts in found.items():
            folder, file = posixpath.split(path)
            name = posixpath.basename(folder)
            if FOLDER_NAME.fullmatch(name) and facts["type"] == "file":
                folders.setdefault(name, {})[file] = facts
        return dict(sorted(folders.items(), key=lambda item: step_of(Path(item[0]))))

    def _abort_uploads(self) -> None:
        """Remove the parts of files that a killed process was writing to S3: they are paid for, but
        listed nowhere. Other stores remove theirs after some days. No error is raised: it needs
        rights that writing does not need."""
        call = getattr(self._fs, "call_s3", None)
        if call is None:
            return
        bucket, _, root = self._root.partition("/")
        prefix = f"{root.rstrip('/')}/" if root else ""
        with suppress(Exception):  # of the client, which have no common class
            found = call("list_multipart_uploads", Bucket=bucket, Prefix=prefix)
            for upload in found.get("Uploads", []):
                key = upload["Key"]
                if FOLDER_NAME.fullmatch(key.removeprefix(prefix).partition("/")[0]):
                    call(
                        "abort_multipart_upload", Bucket=bucket, Key=key,
                        UploadId=upload["UploadId"],
                    )  # fmt: skip

    def _delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm(self._path(name), recursive=True)

    def _path(self, *names: str) -> str:
        return "/".join([self._root.rstrip("/"), *names])


def _signature(files: dict[str, dict[str, Any]]) -> Signature:
    """Name, size and version of each file."""

    def version(facts: dict[str, Any]) -> str:
        kept = {key: str(facts[key]) for key in ("ETag", "etag", "LastModified") if key in facts}
        return json.dumps(kept, sort_keys=True)

    return sorted([name, facts["size"], version(facts)] for name, facts in files.items())


@contextmanager
def _one_line(
    place: str, what: str, kind: type[CheckpointError] = CheckpointError
) -> Generator[None, None, None]:
    """Turn the errors of fsspec and of its clients, which have no common class, into an error of
    one line."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise kind(f"{place}: {what}: {short(why, 300)}") from None

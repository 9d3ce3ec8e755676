"""Checks when a run starts, not at its first save, that all ranks share folders and settings.

Every rank writes its part of a checkpoint into the run's folder and reads the tokenized corpus from
the cache. On another host a path may be another folder: a relative path from another directory, `~`
of another user, a disk that is not mounted. So rank 0 writes a token into both, every other rank
looks for it there, and adds to the one in the run's folder.
"""

import json
import os
import socket
import time
import uuid
import zlib
from contextlib import suppress
from pathlib import Path

from configs.errors import UserError
from configs.loader import flatten
from configs.paths import is_url, local_path
from configs.schema import JobConfig
from parallel.ranks import Ranks, gather_json
from train.checkpoint.manifest_content import short
from train.checkpoint.storage.local import delete

_PATIENCE_S = 10.0
"""Time that a network file system may need to show a new name."""


def check_shared(config: JobConfig, ranks: Ranks) -> None:
    """Raise UserError, on all ranks, if one has other settings or other folders."""
    if ranks.world == 1:
        return
    _check_settings(config)
    _check_folder("run.dir", config.run.dir, ranks, writes=True)
    if config.checkpoint.dir and not is_url(config.checkpoint.dir):
        _check_folder("checkpoint.dir", config.checkpoint.dir, ranks, writes=True)
    _check_folder("data.cache_dir", config.data.cache_dir, ranks, writes=False)


def _check_settings(config: JobConfig) -> None:
    settings = flatten(config)
    crcs = {key: zlib.crc32(json.dumps(value).encode()) for key, value in settings.items()}
    found = gather_json(zlib.crc32(json.dumps(crcs).encode()))
    if len(set(found)) == 1:
        return
    first, *others = gather_json(crcs)
    for rank, other in enumerate(others, start=1):
        keys = [key for key in {**first, **other} if first.get(key) != other.get(key)]
        if keys:
            raise UserError(
                f"rank {rank} was started with other settings than rank 0: "
                f"{short(', '.join(keys), 300)}; every host needs the same file and arguments"
            )


def _check_folder(key: str, setting: str, ranks: Ranks, writes: bool) -> None:
    """writes: whether every rank writes there; otherwise folders that are not writable are
    skipped."""
    folder = local_path(setting)
    name = ranks.on_first(lambda: _place_token(folder, writes))
    if name is None:
        return
    token = folder / name
    try:
        fault = "" if ranks.is_first else _look(token, ranks.rank if writes else None)
        here = {"fault": fault, "folder": str(folder.absolute()), "host": socket.gethostname()}
        found = gather_json(here)
    finally:
        ranks.on_first(lambda: delete(token))
    for rank, there in enumerate(found):
        if there["fault"]:
            raise UserError(
                f"{key} = {short(setting)!r}: rank {rank} on {there['host']} {there['fault']}: "
                f"{short(there['folder'], 200)} there, {short(found[0]['folder'], 200)} on "
                f"{found[0]['host']}; it must be one folder that all hosts share: give an absolute "
                "path on a shared file system"
            )


def _place_token(folder: Path, writes: bool) -> str | None:
    """Create the token, a folder; returns its name, or None if it is neither possible nor
    needed."""
    name = f".shared-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(".shared-*"):  # of a start that was killed
            delete(old)
        (folder / name).mkdir()
    except OSError:
        if writes:
            raise
        return None  # a read-only cache may be complete; opening the corpus checks it
    return name


def _look(token: Path, rank: int | None) -> str:
    """The error of the token on this rank; writes into the token if `rank` is given."""
    deadline = time.monotonic() + _PATIENCE_S
    while not token.is_dir():
        if time.monotonic() > deadline:
            return "does not find there what rank 0 wrote"
        with suppress(OSError):
            os.listdir(token.parent)  # makes a network file system refresh
        time.sleep(0.1)
    if rank is not None:
        try:
            (token / str(rank)).write_text("")
        except OSError as error:
            return f"cannot write there ({error.strerror})"
    return ""

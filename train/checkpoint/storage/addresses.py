"""The storage at an address: a folder, or the URL of an object store."""

from pathlib import Path

from configs.paths import is_url, local_path
from train.checkpoint.storage.base import Storage
from train.checkpoint.storage.local import LocalStorage


def storage_at(address: str) -> Storage:
    """The storage at a path or URL. Raises CheckpointError if its package is not installed."""
    if not is_url(address):
        return LocalStorage(local_path(address))
    from train.checkpoint.storage.object_store import ObjectStorage

    return ObjectStorage(address)


def storage_of_run(run_dir: Path, setting: str) -> Storage:
    """The storage of a run's checkpoints. setting: `checkpoint.dir`."""
    return storage_at(setting) if setting else LocalStorage(run_dir / "checkpoints")

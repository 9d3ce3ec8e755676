"""Checkpoints that any mesh can read, without pickle.

A checkpoint is a folder `step-00000100`: one safetensors file per rank with the boxes of the
tensors of which it is the primary replica (or several that one process wrote one after the other,
`write`), and `manifest.json`, which lists every box (name, whole shape, offset, shape, file), size
and CRC-32 of every file, the run's state and its config. A folder with a manifest is complete; it
is never overwritten. Loading intersects the boxes a rank needs with the saved boxes, and checks
that they cover it, so a run may resume on another mesh.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from models.hf.safetensors_files import MappedFiles
from models.layers.box import Box
from parallel.ranks import Ranks, one_line
from parallel.shards import box_of, local_of
from parallel.store_group import StoreGroup
from train.checkpoint.manifest import (
    CheckpointError,
    Manifest,
    checkpoints,
    find,
    path_of,
    read_manifest,
    verify_files,
)
from train.checkpoint.manifest_content import short
from train.checkpoint.retention import Retention
from train.checkpoint.saving import (
    Save,
    call_here,
    part_of,
    part_of_rank,
    run_save,
    write_part,
)
from train.checkpoint.storage.base import Storage
from train.checkpoint.storage.local import LocalStorage

__all__ = [
    "CheckpointError",
    "Manifest",
    "Reader",
    "Retention",
    "checkpoints",
    "find",
    "load",
    "path_of",
    "read_manifest",
    "save",
    "verify_files",
    "write",
]
_SAVES = count()
"""Saves of this process; all ranks have done the same number."""


def save(
    root: Path | Storage,
    tensors: Mapping[str, Tensor],
    state: dict[str, Any],
    config: dict[str, Any],
    rule: Retention | None,
    ranks: Ranks,
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Write checkpoint `state["step"]` under `root`; all ranks call this together. Returns its
    address: the path of its folder.

    Raises CheckpointError on every rank if one of them cannot write.

    Args:
        root: Folder of the run's checkpoints, or another storage.
        tensors: Live tensors by name, the same names on all ranks.
        state, config: The run's state and settings.
        rule: Which older checkpoints stay; None removes nothing.
        ranks: All ranks.
        say: Called on rank 0 with a line for each folder that could not be removed.
    """
    storage = LocalStorage(root) if isinstance(root, Path) else root
    part = part_of_rank(tensors, ranks.rank)
    new = Save(path_of(Path(), state["step"]).name, state, config, rule)
    run_save(
        new,
        part,
        lambda partial: write_part(storage, partial, part, tensors),
        call_here(storage),
        StoreGroup(ranks, f"save/{next(_SAVES)}"),
        storage,
        say,
    )
    return storage.address(new.name)


def write(
    root: Path,
    parts: Sequence[Callable[[], dict[str, tuple[Box, Tensor]]]],
    state: dict[str, Any],
    config: dict[str, Any],
) -> Path:
    """Write checkpoint `state["step"]` under `root` from this process alone, file by file.

    parts: each creates the boxes of one file when it is called, so that only one file's boxes are
    in memory. Together they must cover every tensor.
    """
    final, storage = path_of(root, state["step"]), LocalStorage(root)
    try:
        partial = storage.begin(final.name, 0)
        reports = [
            _write_boxes(storage, partial, f"part-{i:05d}.safetensors", create())
            for i, create in enumerate(parts)
        ]
        storage.commit_parts(reports, partial, final.name, state, config)
    except OSError as error:
        raise CheckpointError(f"{final}: cannot write the checkpoint: {one_line(error)}") from None
    except UserError as error:
        raise CheckpointError(f"{final}: cannot write the checkpoint: {error}") from None
    return final


def _write_boxes(
    storage: Storage, partial: str, file: str, made: dict[str, tuple[Box, Tensor]]
) -> bytes:
    part = part_of(file, {name: (box, tensor.dtype) for name, (box, tensor) in made.items()})
    return write_part(storage, partial, part, {name: tensor for name, (_, tensor) in made.items()})


_INTERCHANGEABLE = {torch.float32, torch.bfloat16}
"""Each may be loaded as the other: `precision.moments` may change."""


def load(manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    """Fill this rank's part of every tensor in place. Call `verify_files` first."""
    reader = Reader(manifest)
    for name, tensor in tensors.items():
        local, box = local_of(tensor).detach(), box_of(tensor)
        if box.numel:
            value = reader.read(name, box)
            if value.dtype != local.dtype and not {value.dtype, local.dtype} <= _INTERCHANGEABLE:
                raise CheckpointError(
                    f"{manifest.folder}: {name} is {value.dtype}, the model asks for {local.dtype}"
                )
            local.copy_(value.view(local.shape))


class Reader:
    """Boxes of a checkpoint's tensors, assembled from its files."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._files = MappedFiles()

    def whole(self, name: str) -> Box:
        """The box of the whole tensor `name`."""
        shape = self._parts(name)[0][0].whole
        return Box(shape, (0,) * len(shape), shape)

    def read(self, name: str, box: Box) -> Tensor:
        """The data of `box`, on the CPU. Raises CheckpointError if any of it is missing or
        double."""
        result: Tensor | None = None
        covered, twice = torch.zeros(box.shape, dtype=torch.bool), False
        for saved, file in self._parts(name):
            if saved.whole != box.whole:
                raise CheckpointError(
                    f"{self.manifest.folder}: {name} has shape {list(saved.whole)}, "
                    f"the model asks for {list(box.whole)}"
                )
            common = saved.intersect(box)
            if common is None:
                continue
            part = self._slice(file, name, common, saved)
            if result is None:
                result = torch.empty(box.shape, dtype=part.dtype)
            place = common.within(box)
            twice = twice or bool(covered[place].any())
            result[place] = part
            covered[place] = True
        if result is None or not covered.all():
            raise CheckpointError(
                f"{self.manifest.folder}: {name} is incomplete: "
                f"{int(covered.sum())} of {box.numel} elements"
            )
        if twice:
            raise CheckpointError(f"{self.manifest.folder}: boxes of {name} overlap")
        return result

    def _parts(self, name: str) -> list[tuple[Box, str]]:
        parts = self.manifest.boxes.get(name)
        if not parts:
            raise CheckpointError(f"{self.manifest.folder}: has no tensor {short(name)}")
        return parts

    def _slice(self, file: str, name: str, common: Box, saved: Box) -> Tensor:
        """`common`, which is part of `saved`, from the file of `saved`."""
        from safetensors import SafetensorError

        path = self.manifest.folder / file
        try:
            part = self._files.slice(path, name, common.within(saved))
        except (SafetensorError, OSError, IndexError) as error:
            raise CheckpointError(f"{path}: unreadable: {short(str(error))}") from None
        if tuple(part.shape) != common.shape:
            raise CheckpointError(f"{path}: {name} has another shape than its manifest says")
        return part

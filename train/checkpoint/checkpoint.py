"""Checkpoints that any mesh can read, without pickle.

A checkpoint is a folder `step-00000100`: one safetensors file per rank with the boxes of the
tensors of which it is the primary replica (or several that one process wrote one after the other,
`write`), and `manifest.json`, which lists every box (name, whole shape, offset, shape, file), size
and CRC-32 of every file, the run's state and its config. It is written under a temporary name,
fsynced and renamed, so that a folder with a manifest is complete; it is never overwritten. Loading
intersects the boxes a rank needs with the saved boxes, and checks that they cover it, so a run may
resume on another mesh.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from models.hf.safetensors_files import MappedFiles, save_tensors
from models.layers.box import Box
from parallel.ranks import Ranks, gather_json, one_line
from parallel.shards import box_of, is_primary_replica, local_of
from train.atomic_files import replace_text, sync
from train.checkpoint import retention
from train.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    CheckpointError,
    Manifest,
    checkpoints,
    crc32,
    find,
    is_valid,
    path_of,
    read_manifest,
    verify_files,
)
from train.checkpoint.manifest_content import crc32_of, short

__all__ = [
    "CheckpointError",
    "Manifest",
    "Reader",
    "check_folder",
    "checkpoints",
    "find",
    "load",
    "path_of",
    "read_manifest",
    "save",
    "verify_files",
    "write",
]


def check_folder(root: Path) -> None:
    """Raise UserError if no checkpoint can be written under `root`; called before a run trains."""
    why = "this is no folder; move it away"
    try:
        if root.is_dir() or not os.path.lexists(root):
            root.mkdir(parents=True, exist_ok=True)
            probe = retention.free_name(root / ".step-probe")
            probe.mkdir()
            probe.rmdir()
            return
    except OSError as error:
        why = f"cannot be written: {error.strerror}"
    raise CheckpointError(f"{root}: {why}")


def save(
    root: Path,
    tensors: Mapping[str, Tensor],
    state: dict[str, Any],
    config: dict[str, Any],
    keep: int | None,
    ranks: Ranks,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write checkpoint `state["step"]` under `root`; all ranks call this together.

    Raises UserError on every rank if one of them cannot write.

    Args:
        root: Folder of the run's checkpoints.
        tensors: Live tensors by name, the same names on all ranks.
        state, config: The run's state and settings.
        keep: Older checkpoints are removed once this many verified ones exist, this one included
            (`train.checkpoint.retention`); None removes nothing.
        ranks: All ranks.
        say: Called on rank 0 with a line for each folder that could not be removed.
    """
    final = path_of(root, state["step"])
    try:
        partial = Path(ranks.on_first(lambda: str(_begin(root, final))))
        file = partial / f"rank-{ranks.rank:05d}.safetensors"
        reports = gather_json(_write_rank(file, tensors, ranks.rank))
        failed = [report["error"] for report in reports if "error" in report]
        if failed:
            if ranks.is_first:
                retention.delete(partial)  # frees space on a full disk
            raise CheckpointError(failed[0])
        ranks.on_first(lambda: _commit(partial, final, reports, state, config))
    except UserError as error:
        raise CheckpointError(f"{final}: cannot write the checkpoint: {error}") from None
    if keep is not None:
        retention.prune(root, final, keep, ranks, say)
    return final


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
    final = path_of(root, state["step"])
    try:
        partial = _begin(root, final)
        files = [partial / f"part-{i:05d}.safetensors" for i in range(len(parts))]
        reports = [_write_file(file, part()) for file, part in zip(files, parts, strict=True)]
        _commit(partial, final, reports, state, config)
    except OSError as error:
        raise CheckpointError(f"{final}: cannot write the checkpoint: {one_line(error)}") from None
    return final


def _begin(root: Path, final: Path) -> Path:
    """Create the empty folder to write into, after removing leftovers of killed saves."""
    if os.path.lexists(final) and _is_sound(final):
        raise CheckpointError("it exists already")
    root.mkdir(parents=True, exist_ok=True)
    retention.clear(root)
    partial = retention.free_name(root / f".{final.name}.partial")
    partial.mkdir()
    sync(root.parent)
    return partial


def _is_sound(folder: Path) -> bool:
    if not is_valid(folder):  # a loader ignores it
        return False
    try:
        verify_files(read_manifest(folder))
    except CheckpointError:
        return False
    return True


def _write_rank(path: Path, tensors: Mapping[str, Tensor], rank: int) -> dict[str, Any]:
    """Write this rank's boxes; returns their entry of the manifest, or the error."""
    boxes = {name: box_of(tensor) for name, tensor in tensors.items()}
    mine = {
        name: (boxes[name], local_of(tensor).detach().cpu().contiguous())
        for name, tensor in tensors.items()
        if is_primary_replica(tensor, rank) and boxes[name].numel
    }
    if not mine:
        return {}
    try:
        return _write_file(path, mine)
    except Exception as error:  # all ranks must get it
        why = one_line(error) if isinstance(error, OSError) else str(error)
        return {"error": f"rank {rank}: {why}"}


def _write_file(path: Path, boxes: dict[str, tuple[Box, Tensor]]) -> dict[str, Any]:
    """Write one file; returns its entry of the manifest."""
    from safetensors import safe_open

    save_tensors({name: tensor for name, (_, tensor) in boxes.items()}, path)
    sync(path)
    with safe_open(path, framework="pt") as file:
        dtypes = {name: file.get_slice(name).get_dtype() for name in boxes}
    entries = [
        {"name": name, "dtype": dtypes[name], **asdict(box)} for name, (box, _) in boxes.items()
    ]
    size, crc = path.stat().st_size, crc32(path)
    return {"file": path.name, "bytes": size, "crc32": crc, "boxes": entries}


def _commit(
    partial: Path,
    final: Path,
    reports: list[dict[str, Any]],
    state: dict[str, Any],
    config: dict[str, Any],
) -> None:
    written = [report for report in reports if report]
    content = {
        "format": FORMAT,
        "state": state,
        "config": config,
        "files": {r["file"]: {"bytes": r["bytes"], "crc32": r["crc32"]} for r in written},
        "boxes": [{**box, "file": r["file"]} for r in written for box in r["boxes"]],
    }
    content["crc32"] = crc32_of(content)
    replace_text(partial / MANIFEST, json.dumps(content))
    sync(partial)
    damaged = None
    if os.path.lexists(final):  # `_begin` found that it is no checkpoint
        damaged = retention.free_name(final.with_name(f".{final.name}.damaged"))
        final.rename(damaged)
    partial.rename(final)
    sync(final.parent)
    retention.remember(final)
    if damaged is not None:
        retention.delete(damaged)


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

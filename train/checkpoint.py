"""Checkpoints that any mesh can read, without pickle.

A checkpoint is a folder `step-00000100`: one safetensors file per rank with the boxes of the
tensors it speaks for (or several that one process wrote one after the other, `write`), and
`manifest.json`, which lists every box (name, whole shape, offset, shape, file), size and CRC-32 of
every file, the run's state and its config. It is written under a temporary name, fsynced and
renamed, so that a folder with a manifest is complete; it is never overwritten. Loading intersects
the boxes a rank needs with the boxes that were saved, and checks that they cover it, so a run may
resume on another mesh.
"""

import json
import re
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.rules import ConfigError
from models.hf.mapped import MappedFiles
from parallel.ranks import Ranks, gather_json
from parallel.shards import Box, box_of, local_of, speaks_for
from train.durable import replace_text, sync

_FORMAT = 1
_MANIFEST = "manifest.json"


class CheckpointError(ConfigError):
    """A checkpoint that cannot be written or read; the message names the file."""


@dataclass(frozen=True)
class Manifest:
    """The contents of a checkpoint, as its `manifest.json` lists them."""

    folder: Path
    boxes: dict[str, list[tuple[Box, str]]]
    """Tensor name -> (box, file) of every part."""
    files: dict[str, dict[str, int]]
    """File -> its `bytes` and `crc32`."""
    state: dict[str, Any]
    config: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])


def save(
    root: Path,
    tensors: Mapping[str, Tensor],
    state: dict[str, Any],
    config: dict[str, Any],
    keep: int,
    ranks: Ranks,
) -> Path:
    """Write checkpoint `state["step"]` under `root`; all ranks call this together.

    tensors: live tensors by name, the same names on all ranks. Afterwards the oldest checkpoints
    beyond `keep` are removed. Raises ConfigError on every rank if one of them cannot write.
    """
    final = path_of(root, state["step"])
    partial = root / f".{final.name}.partial"
    try:
        ranks.on_first(lambda: _begin(root, final, partial))
        file = partial / f"rank-{ranks.rank:05d}.safetensors"
        reports = gather_json(_write_rank(file, tensors, ranks.rank))
        failed = [report["error"] for report in reports if "error" in report]
        if failed:
            raise CheckpointError(failed[0])
        ranks.on_first(lambda: _commit(partial, final, reports, state, config))
        ranks.on_first(lambda: _prune(root, keep))
    except ConfigError as error:
        raise CheckpointError(f"{final}: cannot write the checkpoint: {error}") from None
    return final


def write(
    root: Path,
    parts: Sequence[Callable[[], dict[str, tuple[Box, Tensor]]]],
    state: dict[str, Any],
    config: dict[str, Any],
) -> Path:
    """Write checkpoint `state["step"]` under `root` from this process alone, file by file.

    parts: each makes the boxes of one file when its turn comes, so that only one file's are held.
    Together they must cover every tensor.
    """
    from safetensors import SafetensorError

    final = path_of(root, state["step"])
    partial = root / f".{final.name}.partial"
    try:
        _begin(root, final, partial)
        files = [partial / f"part-{i:05d}.safetensors" for i in range(len(parts))]
        reports = [_write_file(file, part()) for file, part in zip(files, parts, strict=True)]
        _commit(partial, final, reports, state, config)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{final}: cannot write the checkpoint: {error}") from None
    return final


def _begin(root: Path, final: Path, partial: Path) -> None:
    if final.exists() and not _is_valid(final):  # it does not exist for a loader
        final.rename(root / f".{final.name}.invalid")
    for leftover in root.glob(".step-*"):
        shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    sync(root.parent)


def _is_valid(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except CheckpointError:
        return False
    return True


def _prune(root: Path, keep: int) -> None:
    """Remove old checkpoints; renamed first, so that a kill leaves no half one behind."""
    for old in checkpoints(root)[:-keep]:
        leaving = root / f".{old.name}.leaving"
        old.rename(leaving)
        shutil.rmtree(leaving)


def _write_rank(path: Path, tensors: Mapping[str, Tensor], rank: int) -> dict[str, Any]:
    """Write this rank's boxes; returns what the manifest says of them, or the error."""
    boxes = {name: box_of(tensor) for name, tensor in tensors.items()}
    mine = {
        name: (boxes[name], local_of(tensor).detach().cpu().contiguous())
        for name, tensor in tensors.items()
        if speaks_for(tensor, rank) and boxes[name].numel
    }
    if not mine:
        return {}
    try:
        return _write_file(path, mine)
    except Exception as error:  # safetensors raises its own type; all ranks must hear of it
        return {"error": f"rank {rank}: {error}"}


def _write_file(path: Path, boxes: dict[str, tuple[Box, Tensor]]) -> dict[str, Any]:
    """Write one file; returns what the manifest says of it."""
    from safetensors.torch import save_file

    save_file({name: tensor for name, (_, tensor) in boxes.items()}, path)
    sync(path)
    entries = [{"name": name, **asdict(box)} for name, (box, _) in boxes.items()]
    size, crc = path.stat().st_size, _crc32(path)
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
        "format": _FORMAT,
        "state": state,
        "config": config,
        "files": {r["file"]: {"bytes": r["bytes"], "crc32": r["crc32"]} for r in written},
        "boxes": [{**box, "file": r["file"]} for r in written for box in r["boxes"]],
    }
    content["crc32"] = _crc32_of(content)
    replace_text(partial / _MANIFEST, json.dumps(content))
    sync(partial)
    partial.rename(final)
    sync(final.parent)


def path_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step-{step:08d}"


def checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints under `root`, oldest first."""
    found = (path.parent for path in root.glob(f"step-*/{_MANIFEST}"))
    return sorted(path for path in found if re.fullmatch(r"step-\d{8,}", path.name))


def find(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest below it or its `checkpoints`."""
    if (path / _MANIFEST).is_file():
        return path
    found = checkpoints(path) or checkpoints(path / "checkpoints")
    if not found:
        why = "holds no checkpoint" if path.is_dir() else "no such folder"
        raise CheckpointError(f"{path}: {why}; name a run folder or one of its checkpoints")
    return found[-1]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, after its own checksum and the sizes of all files hold."""
    path = folder / _MANIFEST
    try:
        content = json.loads(path.read_text())
        if content.get("format") != _FORMAT:
            raise CheckpointError(f"{path}: format {content.get('format')}, expected {_FORMAT}")
        if content.pop("crc32") != _crc32_of(content):
            raise CheckpointError(f"{path}: damaged (checksum differs); {_remedy(folder)}")
        files, boxes = content["files"], _boxes_of(content)
        state, config = content["state"], content["config"]
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: unreadable: {why}; {_remedy(folder)}") from None
    for name, facts in files.items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError(f"{file}: missing; {_remedy(folder)}")
        if file.stat().st_size != facts["bytes"]:
            raise CheckpointError(
                f"{file}: {file.stat().st_size} bytes, expected {facts['bytes']}; {_remedy(folder)}"
            )
    return Manifest(folder, boxes, files, state, config)


def _boxes_of(content: dict[str, Any]) -> dict[str, list[tuple[Box, str]]]:
    """The boxes by tensor name. ValueError where one leaves its tensor or names a foreign file."""
    boxes: dict[str, list[tuple[Box, str]]] = {}
    for b in content["boxes"]:
        box = Box(tuple(b["whole"]), tuple(b["offset"]), tuple(b["shape"]))
        axes = zip(box.whole, box.offset, box.shape, strict=True)
        if any(offset < 0 or n < 0 or offset + n > whole for whole, offset, n in axes):
            raise ValueError(f"a box of {b['name']} leaves its tensor")
        if b["file"] not in content["files"]:
            raise ValueError(f"{b['name']} lies in {b['file']}, which is not listed")
        boxes.setdefault(b["name"], []).append((box, b["file"]))
    return boxes


def verify_files(manifest: Manifest, rank: int = 0, world: int = 1) -> None:
    """Compare the checksums of all files, divided among the ranks; raises on all if one fails.

    With `world` 1 no process group is needed.
    """
    mine = sorted(manifest.files)[rank::world]
    bad = [f for f in mine if _crc32(manifest.folder / f) != manifest.files[f]["crc32"]]
    found = bad if world == 1 else [name for names in gather_json(bad) for name in names]
    if found:
        raise CheckpointError(
            f"{manifest.folder / found[0]}: damaged (checksum differs); {_remedy(manifest.folder)}"
        )


def load(manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    """Fill this rank's part of every tensor in place. Call `verify_files` first."""
    reader = Reader(manifest)
    for name, tensor in tensors.items():
        local, box = local_of(tensor).detach(), box_of(tensor)
        if box.numel:
            local.copy_(reader.read(name, box).view(local.shape))


class Reader:
    """Boxes of a checkpoint's tensors, put together from the files that hold them."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._files = MappedFiles()

    def whole(self, name: str) -> Box:
        """The box that is all of tensor `name`."""
        shape = self._parts(name)[0][0].whole
        return Box(shape, (0,) * len(shape), shape)

    def read(self, name: str, box: Box) -> Tensor:
        """The data of `box`, on the CPU. Raises CheckpointError if it is not fully covered."""
        result: Tensor | None = None
        covered = torch.zeros(box.shape, dtype=torch.bool)
        for saved, file in self._parts(name):
            if saved.whole != box.whole:
                raise CheckpointError(
                    f"{self.manifest.folder}: {name} has shape {list(saved.whole)}, "
                    f"the model asks for {list(box.whole)}"
                )
            common = saved.intersect(box)
            if common is None:
                continue
            part = self._slice(file, name, common.within(saved))
            if result is None:
                result = torch.empty(box.shape, dtype=part.dtype)
            result[common.within(box)] = part
            covered[common.within(box)] = True
        if result is None or not covered.all():
            raise CheckpointError(
                f"{self.manifest.folder}: {name} is incomplete: "
                f"{int(covered.sum())} of {box.numel} elements"
            )
        return result

    def _parts(self, name: str) -> list[tuple[Box, str]]:
        parts = self.manifest.boxes.get(name)
        if not parts:
            raise CheckpointError(f"{self.manifest.folder}: has no tensor {name}")
        return parts

    def _slice(self, file: str, name: str, index: tuple[slice, ...]) -> Tensor:
        from safetensors import SafetensorError

        path = self.manifest.folder / file
        try:
            return self._files.slice(path, name, index)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: unreadable: {error}") from None


def _remedy(folder: Path) -> str:
    others = [path for path in checkpoints(folder.parent) if path != folder]
    return f"remove {folder} to use {others[-1].name}" if others else f"remove {folder}"


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            crc = zlib.crc32(block, crc)
    return crc


def _crc32_of(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())

"""The steps of one save, which all ranks run together: reserve a folder, write every rank's file,
commit, remove older checkpoints.

The same steps run in the main thread, where the files are written from the live tensors, and in a
second thread while training continues, where the writer process writes a snapshot.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from configs.errors import UserError
from models.layers.box import Box
from parallel.ranks import one_line
from parallel.shards import box_of, is_primary_replica, local_of
from parallel.store_group import StoreGroup
from train.checkpoint import retention
from train.checkpoint.host_buffer import raw_bytes
from train.checkpoint.manifest import CheckpointError
from train.checkpoint.retention import Retention
from train.checkpoint.storage.base import Storage, finish
from train.checkpoint.storage.layout import FileLayout, file_layout

DTYPES = {
    torch.float64: "F64", torch.int64: "I64", torch.float32: "F32", torch.int32: "I32",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
"""Names of dtypes in safetensors files."""


@dataclass(frozen=True)
class Part:
    """The file of one rank, or one of several files of a process: boxes of tensors."""

    file: str
    layout: FileLayout
    boxes: bytes
    """Its boxes in the manifest, as JSON."""

    @property
    def is_empty(self) -> bool:
        return not self.layout.places

    def report(self, size: int, crc32: int) -> bytes:
        """Its entry for the manifest."""
        head = json.dumps({"file": self.file, "bytes": size, "crc32": crc32})
        return head[:-1].encode() + b', "boxes": ' + self.boxes + b"}"


def part_of(file: str, boxes: Mapping[str, tuple[Box, torch.dtype]]) -> Part:
    """The part that consists of these boxes, by tensor name."""
    dtypes = {name: DTYPES[dtype] for name, (_, dtype) in boxes.items()}
    layout = file_layout({name: (dtypes[name], box.shape) for name, (box, _) in boxes.items()})
    entries = [
        {"name": name, "dtype": dtypes[name], **asdict(box)} for name, (box, _) in boxes.items()
    ]
    return Part(file, layout, json.dumps(entries).encode())


def part_of_rank(tensors: Mapping[str, Tensor], rank: int) -> Part:
    """The boxes of which this rank is the primary replica."""
    boxes = {name: (box_of(tensor), tensor.dtype) for name, tensor in tensors.items()}
    mine = {
        name: boxes[name]
        for name, tensor in tensors.items()
        if is_primary_replica(tensor, rank) and boxes[name][0].numel
    }
    return part_of(f"rank-{rank:05d}.safetensors", mine)


def write_part(storage: Storage, partial: str, part: Part, tensors: Mapping[str, Tensor]) -> bytes:
    """Write a part from tensors that hold the data of its boxes; returns its report."""

    def blocks() -> Any:
        yield part.layout.header
        for name in part.layout.places:
            yield raw_bytes(local_of(tensors[name]).detach()).cpu().numpy()

    return part.report(**_named(finish(storage.write(partial, part.file, blocks()))))


def _named(facts: dict[str, int]) -> dict[str, int]:
    return {"size": facts["bytes"], "crc32": facts["crc32"]}


class Call(Protocol):
    """Calls a method of the storage, here or in the writer process."""

    def __call__(self, method: str, *frames: bytes, **arguments: Any) -> Any: ...


def call_here(storage: Storage) -> Call:
    """Calls methods of the storage in this thread."""

    def call(method: str, *frames: bytes, **arguments: Any) -> Any:
        if method == "commit_parts":
            return storage.commit_parts(frames, **arguments)
        return getattr(storage, method)(**arguments)

    return call


@dataclass(frozen=True)
class Save:
    """One checkpoint to write."""

    name: str
    state: dict[str, Any]
    config: dict[str, Any]
    rule: Retention | None
    """Which older checkpoints stay; None removes none."""


def run_save(
    save: Save,
    part: Part,
    write: Callable[[str], bytes],
    call: Call,
    group: StoreGroup,
    storage: Storage,
    say: Callable[[str], None],
) -> None:
    """Write a checkpoint and remove older ones; all ranks call it together.

    Raises CheckpointError on every rank if one of them cannot write; nothing of the checkpoint
    stays then.

    write: writes this rank's part into the folder whose name it gets, and returns its report. call:
    used on rank 0, and on all to compare files. say: gets the lines of `retention.prune` on rank 0.
    """
    sizes = group.collect(str(0 if part.is_empty else part.layout.size).encode())
    try:
        needed = sum(map(int, sizes))
        partial = group.on_first(lambda: call("begin", name=save.name, needed=needed))
        report = b"" if part.is_empty else _report_or_error(write, partial, group.rank)
        reports = group.collect(report)

        def commit() -> Any:
            failed = [r.removeprefix(_FAILED) for r in reports if r.startswith(_FAILED)]
            try:
                if failed:
                    raise CheckpointError(failed[0].decode())
                return call(
                    "commit_parts", *reports, partial=partial, name=save.name, state=save.state,
                    config=save.config,
                )  # fmt: skip
            except (UserError, OSError):
                with suppress(UserError, OSError):
                    call("discard", partial=partial)  # frees space on a full disk
                raise

        signature = group.on_first(commit)
    except UserError as error:
        where = storage.address(save.name)
        raise CheckpointError(f"{where}: cannot write the checkpoint: {error}") from None
    retention.remember(storage.address(save.name), signature)
    if save.rule is None:
        return
    try:
        retention.prune(storage, save.name, save.rule, call, group, say)
    except UserError as error:  # the checkpoint itself is complete
        if group.is_first:
            say(f"{storage.address()}: older checkpoints cannot be removed: {error}")


_FAILED = b"!"


def _report_or_error(write: Callable[[str], bytes], partial: str, rank: int) -> bytes:
    try:
        return write(partial)
    except Exception as error:  # rank 0 must get it
        why = one_line(error) if isinstance(error, OSError) else str(error)
        return _FAILED + f"rank {rank}: {why}".encode(errors="replace")

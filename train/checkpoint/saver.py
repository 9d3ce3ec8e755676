"""Saves the states of a run, while training continues or, at its end, at once."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from configs.errors import ConfigError
from configs.schema import CheckpointConfig
from parallel.launch_environment import read_launch_environment
from parallel.ranks import Ranks
from parallel.shards import local_of
from parallel.store_group import StoreGroup
from train.atomic_files import claim
from train.checkpoint import checkpoint
from train.checkpoint.background_save import BackgroundSave
from train.checkpoint.checkpoint import CheckpointError, Retention
from train.checkpoint.host_buffer import HostBuffer
from train.checkpoint.manifest import path_of
from train.checkpoint.saving import Part, Save, part_of_rank
from train.checkpoint.storage.addresses import storage_of_run
from train.checkpoint.storage.base import Storage
from train.checkpoint.storage.client import WriterProcess
from train.checkpoint.storage.local import LocalStorage

_PATIENCE_S = 10.0
"""How long a save waits for the one before; then it is postponed and training continues."""
_POLL_S = 0.005
_PAUSES_S = (1.0, 4.0, 15.0)
"""Pauses after failures of the last save of a run, which nothing follows that could repeat it."""


def open_storage(run_dir: Path, setting: str, ranks: Ranks) -> Storage:
    """The storage of a run's checkpoints, which can be written. setting: `checkpoint.dir`. Raises
    UserError on all ranks."""
    storage: Storage = ranks.on_every(lambda: storage_of_run(run_dir, setting))
    if storage.is_private and ranks.world > 1:
        raise ConfigError(
            f"checkpoint.dir = {setting}: is in the memory of one process; {ranks.world} ranks "
            "need a folder or an object store"
        )
    ranks.on_first(storage.check)
    if setting and isinstance(storage, LocalStorage):
        ranks.on_first(lambda: claim(storage.root))
    return storage


class Saver:
    """Writes the checkpoints of a run; all ranks call its methods together.

    A regular save blocks the loop for a copy to host memory; a thread and a process do the rest
    (`background_save`). One save is complete before the next begins. The last save of a run is
    written directly from the live tensors, and is durable when `save_now` returns.
    """

    def __init__(
        self,
        storage: Storage,
        config: CheckpointConfig,
        settings: dict[str, Any],
        ranks: Ranks,
    ) -> None:
        """settings: of the run, for the manifest."""
        self.storage, self.ranks, self._settings = storage, ranks, settings
        self._rule = Retention(config.keep, config.keep_every, config.keep_best)
        self._is_async = config.async_save and not storage.is_private
        self.saved = 0
        """Step of the newest complete checkpoint; 0 without one."""
        self._is_owed = False
        self._active: BackgroundSave | None = None
        self._lines: list[str] = []
        self._blocked_s, self._fields = 0.0, dict[str, float]()
        self._part: Part | None = None
        self._buffer: HostBuffer | None = None
        self._writer: WriterProcess | None = None
        self._group = StoreGroup(ranks, "background")

    def resume(self, saved: int) -> None:
        """Continue from the checkpoint of that step; 0 for none. No save may be in progress."""
        self.saved, self._is_owed = saved, False

    @property
    def is_owed(self) -> bool:
        """Whether a save was postponed or failed, and the current state should be saved."""
        return self._is_owed and self._active is None

    def save(self, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """Save the state of step `state["step"]` while training continues. An error is reported,
        and the save repeated; nothing is raised."""
        with self._blocking():
            is_postponed = self._active is not None and self._is_owed
            if is_postponed or not self._end_active(_PATIENCE_S):
                return
            self._is_owed = False
            if self._is_async and self._has_buffer(tensors):
                self._begin(tensors, state)
                return
            try:
                self._write(tensors, state, self._rule)
            except CheckpointError as error:
                self._lines.append(f"{error}; training continues")

    def save_now(
        self, tensors: Mapping[str, Tensor], state: dict[str, Any], keep_all: bool = False
    ) -> None:
        """Save a state from the live tensors. Raises CheckpointError on all ranks if that fails
        again and again, with 20 seconds of pauses.

        keep_all: remove no older checkpoint.
        """
        with self._blocking():
            self.finish()
            if self.saved == state["step"]:
                return
            rule = None if keep_all else self._rule
            for pause in _PAUSES_S:
                try:
                    return self._write(tensors, state, rule)
                except CheckpointError as error:
                    self._lines.append(f"{error}; the save is repeated")
                    time.sleep(pause)
            self._write(tensors, state, rule)

    def poll(self) -> None:
        """Look after a save in progress; called after every step."""
        if self._active is not None and _agreed(self._active.is_over, False)[0]:
            self._resolve(self._active)

    def finish(self) -> None:
        """Wait for the save in progress."""
        self._end_active(float("inf"))
        self._is_owed = False

    def lines(self) -> list[str]:
        """New messages for the user, on rank 0."""
        found, self._lines = self._lines, []
        return found + (self._active.lines() if self._active is not None else [])

    def fields(self) -> dict[str, float]:
        """Metrics since the last call; empty if nothing was saved."""
        found, self._fields = self._fields, {}
        if self._blocked_s:
            found["checkpoint/blocked_s"] = self._blocked_s
        self._blocked_s = 0.0
        return found

    def close(self) -> None:
        """End threads and processes. A save in progress is abandoned: call `finish` before."""
        if self._active is not None:
            self._active.hurry()
        self._group.abandon()
        if self._writer is not None:
            self._writer.stop()
        if self._active is not None:
            self._active.join()
        if self._buffer is not None:
            self._buffer.close()

    @contextmanager
    def _blocking(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._blocked_s += time.monotonic() - start

    def _write(
        self, tensors: Mapping[str, Tensor], state: dict[str, Any], rule: Retention | None
    ) -> None:
        path = checkpoint.save(
            self.storage, tensors, state, self._settings, rule, self.ranks, self._lines.append
        )
        self.saved = state["step"]
        self._lines.append(f"saved {path}")

    def _begin(self, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        assert self._buffer is not None and self._writer is not None and self._part is not None
        local = {name: local_of(tensors[name]).detach() for name in self._part.layout.places}
        self._buffer.fill(self._part.layout, local)
        self._writer.urgent(False)
        save = Save(path_of(Path(), state["step"]).name, state, self._settings, self._rule)
        self._active = BackgroundSave(save, self._part, self._writer, self._group, self.storage)

    def _has_buffer(self, tensors: Mapping[str, Tensor]) -> bool:
        """Allocate the buffer at the first save. If a rank has not enough memory, all ranks write
        from the live tensors from now on."""
        if self._buffer is not None:
            return True
        self._part = part_of_rank(tensors, self.ranks.rank)
        size = max(self._part.layout.size, 1)
        buffer = None
        with suppress(OSError):
            buffer = HostBuffer(size, self.ranks.device, read_launch_environment().local_world)
        if not _agreed(buffer is not None, False)[0]:
            self._is_async = False
            if buffer is not None:
                buffer.close()
            self._lines.append(
                f"checkpoint.async_save: not enough host memory for a copy of {size:,} bytes per "
                "rank; steps wait for each checkpoint"
            )
            return False
        assert buffer is not None
        self._buffer = buffer
        self._writer = WriterProcess(self.storage.address(), buffer.descriptor)
        return True

    def _end_active(self, patience: float) -> bool:
        """Wait for the save in progress, `patience` seconds; returns whether it has ended."""
        active = self._active
        if active is None:
            return True
        active.hurry()
        deadline = time.monotonic() + patience
        while True:
            late = self.ranks.is_first and time.monotonic() > deadline
            is_over, is_late = _agreed(active.is_over, late)
            if is_over:
                self._resolve(active)
                return True
            if is_late:
                active.slow_down()
                seconds = time.monotonic() - active.started
                self._lines.append(
                    f"{self.storage.address(active.save.name)}: being written for {seconds:.0f} s; "
                    "training continues, the next one is saved afterwards"
                )
                self._is_owed = True
                return False
            time.sleep(_POLL_S)

    def _resolve(self, active: BackgroundSave) -> None:
        """Take over the result of a save that has ended on all ranks."""
        self._active = None
        self._lines += active.lines()
        self._fields |= {"checkpoint/write_s": active.seconds}
        if active.failures:
            self._fields |= {"checkpoint/failures": float(active.failures)}
        address = self.storage.address(active.save.name)
        if active.error:
            self._is_owed = True
            self._lines.append(f"not saved: {active.error}")
            return
        self.saved = active.save.state["step"]
        self._lines.append(f"saved {address}")


def _agreed(is_over: bool, is_late: bool) -> tuple[bool, bool]:
    """Whether all ranks are over, and whether one is late; the same on all ranks."""
    flags = torch.tensor([int(not is_over), int(is_late)])
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return not flags[0], bool(flags[1])

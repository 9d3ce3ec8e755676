"""Several ranks that serve one model: rank 0 decides, all compute.

Rank 0 has the scheduler, the sampler and the HTTP server. Before each forward pass it broadcasts
the `ForwardBatch`: a few integers per token and page, in one message of 8 KiB unless there are
more. The other ranks have none of the server's state but their part of the weights and of the KV
cache, so there is nothing that could differ from rank 0's. (The alternative, the same scheduler on
every rank and broadcast requests, would exchange as many messages, since cancellations and arrivals
must take effect before the same step everywhere; and every rank would need each sampled token.)

Every rank runs the same forward pass in the same order, so collectives of the model match. An error
in a pass cannot be answered by an error of its requests as in one process: other ranks may wait in
another collective. So it ends all ranks.
"""

import hashlib
import logging
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from configs.errors import UserError
from configs.model import ModelConfig
from configs.parallel_dims import resolve_serving
from models.decoder import Decoder
from models.hf.files import read_config
from parallel.launch_environment import read_launch_environment
from parallel.ranks import Ranks, any_rank, gather_json, start_ranks, stop_ranks
from serve.cache.kv_cache import KvCache
from serve.engine.batch import ForwardBatch
from serve.engine.runner import ModelRunner, Routing, Score

if TYPE_CHECKING:
    from parallel.apply import InferenceSharding

log = logging.getLogger("serve")

BEAT_S = 2.0
"""Time between two checks that all ranks are alive, while there is nothing to compute. It is also
what keeps the waiting ranks' collective from timing out (30 minutes)."""
_FIRST = 1024
"""Numbers of the first message."""
_FIELDS = tuple(ForwardBatch.__dataclass_fields__)
_SHORT = ("query_starts", "key_lengths", "page_tables")
"""Fields of int32."""


class Command(IntEnum):
    """What the other ranks do next."""

    STEP = 0
    RECORDED_STEP = 1
    """A step whose experts are reported."""
    LOAD = 2
    """Load the weights of another folder."""
    BEAT = 3
    STOP = 4
    COUNTS = 5
    """Sum the counts of the experts over ranks that route different tokens."""


class RankGroup:
    """The ranks of one server, of which this process is one."""

    def __init__(self, ranks: Ranks, sharding: "InferenceSharding", name: str) -> None:
        """name: of the export, for messages."""
        self.ranks, self.sharding, self.name = ranks, sharding, name
        self.dims = sharding.mesh.parallel_dims
        self._stopped = False

    @property
    def size(self) -> int:
        return self.ranks.world

    def __str__(self) -> str:
        return f"{self.size} ranks: tp {self.dims.tp}, ep {self.dims.ep}"

    def local_model(self, model: ModelConfig) -> ModelConfig:
        """The model with the heads of one rank, which determine the size of its KV cache."""
        a, tp = model.attention, self.dims.tp
        kv_heads = a.n_kv_heads // tp
        return replace(model, attention=replace(a, n_heads=a.n_heads // tp, n_kv_heads=kv_heads))

    def least_memory(self, free: int) -> int:
        """The least of all ranks' `free` bytes; on a CPU, the ranks of a host share them."""
        if self.ranks.device.type == "cpu":
            free //= read_launch_environment().local_world
        least = torch.tensor([free])
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return int(least.item())

    def check_equal(self, settings: Mapping[str, object]) -> None:
        """Raise UserError on all ranks if one was started with other settings than rank 0."""
        mine = {
            key: hashlib.sha256(repr(value).encode()).hexdigest() for key, value in settings.items()
        }
        first, *others = gather_json(mine)
        for rank, its in enumerate(others, start=1):
            differ = [key for key in first if its[key] != first[key]]
            if differ:
                raise UserError(f"rank {rank}: other settings than rank 0: {', '.join(differ)}")

    def send(self, command: Command, batch: ForwardBatch | None = None, text: str = "") -> None:
        """On rank 0: send a command to the other ranks. batch: of a step. text: of LOAD."""
        parts = [torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)]
        table_width = 0
        if batch is not None:
            parts = [getattr(batch, name).flatten().cpu() for name in _FIELDS]
            table_width = batch.page_tables.shape[1]
        body = torch.cat([part.long() for part in parts])
        sizes = [len(part) for part in parts] + [0] * (len(_FIELDS) - len(parts))
        head = torch.tensor([command, table_width, *sizes])
        message = torch.cat([head, body])
        first = message.new_zeros(_FIRST)
        first[: len(message)] = message[:_FIRST]
        dist.broadcast(first, 0)
        if len(message) > _FIRST:
            dist.broadcast(message[_FIRST:].clone(), 0)

    def receive(self) -> tuple[Command, ForwardBatch | None, str]:
        """Wait for what rank 0 sends: the command, its batch, its text."""
        first = torch.zeros(_FIRST, dtype=torch.int64)
        dist.broadcast(first, 0)
        n = 2 + len(_FIELDS)
        command, table_width, *sizes = first[:n].tolist()
        message = first
        if n + sum(sizes) > _FIRST:
            rest = first.new_empty(n + sum(sizes) - _FIRST)
            dist.broadcast(rest, 0)
            message = torch.cat([first, rest])
        parts = message[n : n + sum(sizes)].split(sizes)
        if command == Command.LOAD:
            return Command.LOAD, None, bytes(parts[0].tolist()).decode()
        if command not in (Command.STEP, Command.RECORDED_STEP):
            return Command(command), None, ""
        fields = dict(zip(_FIELDS, parts, strict=True))
        for name in _SHORT:
            fields[name] = fields[name].int()
        fields["page_tables"] = fields["page_tables"].view(-1, table_width)
        return Command(command), ForwardBatch(**fields), ""

    def begin(self) -> None:
        """Wait until all ranks can compute."""
        with self.watched():
            any_rank(False)

    def beat(self) -> None:
        """Wait for all ranks, which ends the process if one is lost. Rank 0 sends the command."""
        if self.ranks.is_first:
            with self.watched():
                self.send(Command.BEAT)
        self.begin()

    def stop(self) -> None:
        """On rank 0: let the others end. A second call has no effect."""
        if not self._stopped:
            self._stopped = True
            with self.watched():
                self.send(Command.STOP)

    def leave(self) -> None:
        """Leave the process group, all ranks together, after `stop`."""
        stop_ranks()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """End the process, with one line, if ranks are lost or this one fails."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            monitor = self.ranks.rank_monitor
            assert monitor is not None, "there are several ranks"
            monitor.end_if_lost(self.name, "start the server again")
            log.exception("a step failed")
            first = (str(error).splitlines() or [""])[0][:200]
            monitor.end(f"{self.name}: {type(error).__name__}: {first}")


class RankRunner(ModelRunner):
    """A runner whose steps all ranks of a group compute together. On rank 0 `run` sends the batch;
    the others call it with the batch that they receive."""

    def __init__(self, model: Decoder, cache: KvCache, absorbed: bool, group: RankGroup) -> None:
        super().__init__(model, cache, absorbed, fuses=False, n_ranks=group.size)
        self.group = group

    def run(
        self, batch: ForwardBatch, score: Score | None = None, routing: Routing | None = None
    ) -> Tensor:
        """As `ModelRunner.run`, with the same result on every rank."""
        with self.group.watched():
            if self.group.ranks.is_first:
                command = Command.STEP if routing is None else Command.RECORDED_STEP
                self.group.send(command, batch)
            return super().run(batch, score, routing)

    def expert_counts(self) -> NDArray[np.int64]:
        """As `ModelRunner.expert_counts`, of all tokens; called on every rank, between steps."""
        with self.group.watched():
            if self.group.ranks.is_first:
                self.group.send(Command.COUNTS)
            return self.model.tp_comm.sum(self.counts.total_LE.clone()).cpu().numpy()


def connect(folder: Path, tp: int, ep: int, device: str = "auto") -> RankGroup | None:
    """Join the ranks that the launcher started; None for a single process.

    Args:
        folder: The export.
        tp, ep: Number of ranks that divide heads, widths and vocabulary, and the experts.
        device: `auto`, `cpu`, or `cuda`: each rank uses the device of its number on its host.

    From now on SIGINT and SIGTERM end the process. Raises UserError, one line, if the degrees do
    not fit the model or the number of ranks, or the ranks cannot connect.
    """
    model, _ = read_config(folder)
    dims = resolve_serving(model, tp, ep, read_launch_environment().world)
    if dims.world == 1:
        return None
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: must be auto, cpu or cuda with several ranks")
    handle_signals(signal.SIG_DFL)
    ranks = start_ranks(use_cuda=device != "cpu")
    if device == "cuda" and ranks.device.type != "cuda":
        raise UserError("--device cuda: this host has no CUDA device")
    # they import torch's compiler, which takes a second that one process need not wait
    from parallel.apply import InferenceSharding
    from parallel.mesh import build

    sharding = InferenceSharding(build(dims, ranks.device.type))
    return RankGroup(ranks, sharding, folder.resolve().name)


def handle_signals(handler: Any) -> None:
    """Set the handler of SIGINT and SIGTERM; only the main thread of a process can."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handler)

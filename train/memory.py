"""The memory that a rank will need at the worst moment of a step, and the bytes it exchanges.

A step is gone through in time: states, then for a microbatch embedding, blocks, loss, and back,
with what each block keeps and needs for the moment (`parallel.memory.rehearsal`) and what FSDP2
gathers and reduces around it (`parallel.memory.fsdp_memory`). The second step is meant, when AdamW
has its moments; of several microbatches the last, when there are gradients to add to. The largest
sum on the way is the answer, with what it consists of.

Counted is what tensors hold. Not counted: rounding and fragmentation of the allocator, workspaces
of libraries, buffers of NCCL, Python and torch themselves.

Exchanged is what goes into a collective or, for a gather, what comes out: the bytes of its larger
side. Not counted: the sums of a few numbers per step (loss, norm of the gradients, loads).
"""

from collections import Counter
from dataclasses import dataclass

import torch

from configs.parallel_dims import ParallelDims
from configs.schema import JobConfig
from parallel.memory.fsdp_memory import FP8_SHARDS, BlockGroups, Group, Groups, Sharding, groups_of
from parallel.memory.rehearsal import (
    EXPERTS,
    EXPERTS_BACK,
    EXPERTS_DONE,
    LAYERS,
    MASKS,
    MTP,
    REDUCE,
    Rehearsal,
    Traces,
)
from parallel.memory.shadow import Bytes, Ledger, Segment, Trace


@dataclass(frozen=True)
class Needs:
    """What a rank holds at the worst moment of a step and what it exchanges in a whole one, bytes
    by kind."""

    peak: Bytes
    host: Bytes
    """In host memory, with `parallel.cpu_offload` on an accelerator."""
    exchanged: Bytes
    """By axis of the mesh and kind of collective."""


def predict(
    config: JobConfig, parallel_dims: ParallelDims, device: str, compute: torch.dtype
) -> tuple[Needs, Needs]:
    """What a step needs of a rank, for loads of the experts that are even, and the worst: all
    tokens of all ranks choose the same experts, and this rank has them.

    device: `cpu` or `cuda`. compute: dtype of forward and backward.
    """
    rehearsal = Rehearsal(config, parallel_dims, device, compute)
    groups = groups_of(
        rehearsal.model, rehearsal.divided, parallel_dims, config.parallel.reshard_after_forward
    )
    even, worst = (
        _Step(config, parallel_dims, device, compute, groups, traces).run()
        for traces in rehearsal.run()
    )
    return even, worst


class _Step:
    """Goes through a step."""

    def __init__(
        self,
        config: JobConfig,
        parallel_dims: ParallelDims,
        device: str,
        compute: torch.dtype,
        groups: Groups,
        traces: Traces,
    ) -> None:
        self.config, self.device, self.groups, self.traces = config, device, groups, traces
        self.passes = config.train.global_batch // (
            config.train.micro_batch * parallel_dims.data_ranks
        )
        self.ledger = self.home = Ledger()
        if config.parallel.cpu_offload and device != "cpu":
            self.home = Ledger()
        self.fsdp = Sharding(
            self.ledger,
            self.home,
            compute.itemsize,
            parallel_dims.dp_replicate,
            gloo=device == "cpu",
        )

    def run(self) -> Needs:
        """States, the last one or two microbatches, the norm of the gradients."""
        train, groups = self.config.train, self.groups.all()
        own = sum(group.own for group in groups) * 4
        self.home.add("parameters", own)
        moment = 2 if self.config.precision.moments == "bf16" else 4
        self.home.add("AdamW moments", 2 * moment * own // 4)
        self.ledger.add(FP8_SHARDS, sum(s.kept for group in groups for s in group.shards))
        # tokens, positions, targets
        self.ledger.add("batch", 24 * self.passes * train.micro_batch * self.config.data.seq_len)
        # those of used microbatches stay to the end of the step
        masks = sum(_net(trace) for trace in self.traces.masks.values())
        self.ledger.add(MASKS, masks * max(self.passes - 2, 0))
        self.fsdp.quantize(groups)
        once, n_run = Counter(self.ledger.exchanged), min(self.passes, 2)
        for _ in range(n_run):
            self._microbatch()
        for kind, n_bytes in self.ledger.exchanged.items():  # every microbatch exchanges as much
            self.ledger.exchanged[kind] += (n_bytes - once[kind]) * (self.passes - n_run) // n_run
        largest = 4 * max(shard.own for group in groups for shard in group.shards)
        if self.device == "cpu":
            self.ledger.add("gradient norm", largest)
            self.ledger.add("gradient norm", -largest)
        if moment == 2:  # both in fp32, one parameter at a time
            self.home.add("AdamW moments", 2 * largest)
            self.home.add("AdamW moments", -2 * largest)
        host = Counter() if self.home is self.ledger else self.home.now
        return Needs(self.ledger.peak, host, +self.ledger.exchanged)

    def _microbatch(self) -> None:
        fsdp, root, norm = self.fsdp, self.groups.root, self.groups.norm
        forward, backward = self.traces.ends
        fsdp.use(root, forward=True)
        n_layers = self.config.model.n_layers
        ahead = n_layers
        for step in forward:
            if isinstance(step, Segment):
                self.ledger.replay(step)
            elif step == MTP:
                self._forward(ahead)
                ahead += 1
            else:
                for index in range(n_layers):
                    self._forward(index)
                if norm is not None:
                    fsdp.use(norm, forward=True)
                    fsdp.end_forward(norm)
        fsdp.end_forward(root)
        fsdp.end_all_forward()
        fsdp.begin_backward(root, ahead=True)
        for step in backward:
            if isinstance(step, Segment):
                self.ledger.replay(step)
            elif step == MTP:
                ahead -= 1
                self._backward(ahead)
            elif step == LAYERS:
                self._backward_layers()
            else:
                self._reduction(step, root)
        fsdp.end_backward(self.groups.all())

    def _backward_layers(self) -> None:
        norm = self.groups.norm
        if norm is not None:
            self.fsdp.begin_backward(norm, ahead=True)
            self.fsdp.reduce(norm)
            self.fsdp.reduced(norm)
        for index in reversed(range(self.config.model.n_layers)):
            self._backward(index)

    def _forward(self, index: int) -> None:
        groups, ahead = self.groups.blocks[index], self.config.parallel.prefetch
        self.fsdp.use(groups.dense, forward=True)
        for block in self.groups.blocks[index + 1 : index + 1 + ahead]:
            for group in block.all():
                self.fsdp.gather(group)
        if groups.undivided is not None:
            self.fsdp.use(groups.undivided, forward=True)
        if index in self.traces.masks:
            self._replay(self.traces.masks[index], groups, backward=False)
        self._replay(self.traces.blocks[self.traces.kinds[index]][0], groups, backward=False)
        if groups.undivided is not None:
            self.fsdp.end_forward(groups.undivided)
        self.fsdp.end_forward(groups.dense)

    def _backward(self, index: int) -> None:
        groups, parallel = self.groups.blocks[index], self.config.parallel
        before = self.groups.blocks[max(index - parallel.prefetch, 0) : index][::-1]
        self.fsdp.begin_backward(groups.dense, ahead=not before)
        for block in before:
            for group in block.all():
                self.fsdp.gather(group)
        if parallel.recompute == "selective" and index % parallel.recompute_every == 0:
            for group in groups.all():
                self.fsdp.use(group, forward=False)
        if groups.undivided is not None:
            self.fsdp.begin_backward(groups.undivided, ahead=True)
        self._replay(self.traces.blocks[self.traces.kinds[index]][1], groups, backward=True)

    def _replay(self, trace: Trace, groups: BlockGroups, backward: bool) -> None:
        """What a block does, with its experts gathered and reduced where the trace has them."""
        fsdp, experts = self.fsdp, groups.experts
        reducing = [g for g in (groups.undivided, groups.dense) if g is not None]
        for step in trace:
            if isinstance(step, Segment):
                self.ledger.replay(step)
            elif step == EXPERTS and experts is not None:
                fsdp.use(experts, forward=True)
            elif step == EXPERTS_DONE and experts is not None:
                if not backward:  # where a block runs again they stay
                    fsdp.end_forward(experts)
            elif step == EXPERTS_BACK and experts is not None:
                fsdp.begin_backward(experts, ahead=True)
                if reducing[0] is not experts:  # the first of its chunks
                    reducing.insert(0, experts)
            else:
                of_experts = reducing[0] is experts
                for group in reducing[:1] if of_experts else reducing:
                    self._reduction(step, group)
                if of_experts and step != REDUCE:
                    reducing.pop(0)

    def _reduction(self, mark: str, group: Group) -> None:
        if mark == REDUCE:
            self.fsdp.reduce(group)
        else:
            self.fsdp.reduced(group)


def _net(trace: Trace) -> int:
    return sum(step.net.total() for step in trace if isinstance(step, Segment))

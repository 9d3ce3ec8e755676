"""What FSDP2 holds besides a rank's shards: gathered weights, and the buffers of its exchanges; and
what it exchanges.

This follows torch's code (`torch.distributed.fsdp._fully_shard`, 2.13) step by step, because the
order of its allocations decides the peak:

- a gather makes a flat output for the whole group (in the dtype of computation), and, when the
  group is needed, a second copy as the parameters themselves. In forward the flat output is held
  until the next group has been copied out; a group gathered ahead holds its flat output until it is
  needed.
- a reduction makes a flat fp32 input of the size of all gradients of the group, then gives the
  gradients up, then makes the rank's part; the input is held until the next group reduces.
- weights that are not sharded along their first dimension cost one more copy, of each or of all.
- weights in FP8 (`parallel.fp8_weights`) take one byte, and nothing is cast: every rank keeps the
  bytes that it sends.

Groups of one rank copy their shards without a flat output. With recomputation a block's experts are
gathered when they run again, and stay.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from configs.parallel_dims import ParallelDims
from models.decoder import Decoder
from models.fp8 import WEIGHTS
from models.layers.linear import Fp8Module
from models.moe import Experts
from parallel.apply import placement
from parallel.fp8_weights import kept_bytes, n_blocks
from parallel.memory.shadow import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, Ledger

GATHERED, REDUCTION = "gathered weights", "gradient reduction"
FP8_SHARDS = "shards in FP8"
"""Kinds of memory."""


@dataclass(frozen=True)
class Shard:
    """A parameter as FSDP2 sees it: elements, padded to whole shards."""

    whole: int
    own: int
    moved: bool
    """Whether it is sharded along another dimension than the first."""
    kept: int = 0
    """Bytes that a weight in FP8 keeps on this rank, its scales included; 0 for others."""
    blocks: int = 0
    """Blocks with a scale that all these ranks know."""

    def item(self, compute: int) -> int:
        """Bytes of an element while it is gathered. compute: of the dtype of computation."""
        return 1 if self.kept else compute


@dataclass(eq=False)
class Group:
    """Parameters that are gathered and reduced together."""

    shards: list[Shard]
    axis: str
    """Of the mesh, along which it is sharded."""
    ranks: int
    """Ranks that shard it."""
    keeps: bool = False
    """Stays gathered after forward."""
    gathering: bool = False
    gathered: bool = False
    places: list[int] = field(default_factory=list)
    """Where in the order of this forward pass it was done."""
    known_bytes: dict[tuple[int, bool], int] = field(default_factory=dict)
    """What `gathered_bytes` found."""

    @cached_property
    def whole(self) -> int:
        return sum(shard.whole for shard in self.shards)

    @cached_property
    def own(self) -> int:
        return sum(shard.own for shard in self.shards)

    def gathered_bytes(self, compute: int, moved: bool = False) -> int:
        """Of all, or of those only that are not sharded along their first dimension."""
        if (compute, moved) not in self.known_bytes:
            shards = [shard for shard in self.shards if shard.moved or not moved]
            found = sum(shard.whole * shard.item(compute) for shard in shards)
            self.known_bytes[compute, moved] = found
        return self.known_bytes[compute, moved]

    def cast_bytes(self, compute: int) -> list[int]:
        """Of each part that is cast before it is gathered."""
        return [s.own * compute for s in self.shards if not s.kept and compute != 4]


@dataclass(frozen=True)
class BlockGroups:
    """The groups of one block; None where a block has none of its own."""

    dense: Group
    undivided: Group | None
    experts: Group | None

    def all(self) -> list[Group]:
        """In the order of their modules."""
        return [g for g in (self.dense, self.undivided, self.experts) if g is not None]


@dataclass(frozen=True)
class Groups:
    """All groups of a model."""

    root: Group
    norm: Group | None
    """The last norm, where `tp` divides the rest of the root."""
    blocks: list[BlockGroups]

    def all(self) -> list[Group]:
        """Every group once."""
        ends = [self.root] if self.norm is None else [self.root, self.norm]
        return ends + [group for block in self.blocks for group in block.all()]


def groups_of(
    model: Decoder, divided: set[nn.Module], parallel_dims: ParallelDims, reshard: bool
) -> Groups:
    """The groups that `parallel.apply` makes of a rank's part of a model.

    divided: modules whose own weights the ranks of `tp` divide. reshard: after forward.
    """
    d = parallel_dims
    blocks, taken = [], set[nn.Parameter]()
    axes = {"dp_shard": d.dp_shard, "dp_shard_tp": d.dp_shard * d.tp, "efsdp": d.efsdp}
    shards_of = dict[nn.Module, dict[str, list[Shard]]]()
    for block in model.blocks():  # a block may stand for several
        own = shards_of.setdefault(block, {axis: [] for axis in axes})
        for module in () if any(own.values()) else block.modules():
            is_experts = isinstance(module, Experts)
            axis = "dp_shard"
            if is_experts and d.tp * d.ep > 1:
                axis = "efsdp"
            elif d.tp > 1 and module not in divided and not is_experts:
                axis = "dp_shard_tp"
            own[axis] += [
                _shard(p, axes[axis], is_experts, isinstance(module, Fp8Module) and key in WEIGHTS)
                for key, p in module.named_parameters(recurse=False)
            ]
            taken.update(module.parameters(recurse=False))
        dense, undivided, experts = (
            Group(shards, axis, axes[axis], not reshard) for axis, shards in own.items()
        )
        blocks.append(
            BlockGroups(
                dense,
                undivided if undivided.shards else None,
                experts if experts.shards else None,
            )
        )
    norm = None
    if d.tp > 1:
        shards = [_shard(model.norm.weight, axes["dp_shard_tp"], False)]
        norm = Group(shards, "dp_shard_tp", axes["dp_shard_tp"], not reshard)
        taken.add(model.norm.weight)
    rest = [p for p in model.parameters() if p not in taken]
    root = Group([_shard(p, d.dp_shard, False) for p in rest], "dp_shard", d.dp_shard, True)
    return Groups(root, norm, blocks)


def _shard(parameter: nn.Parameter, ranks: int, is_expert: bool, fp8: bool = False) -> Shard:
    dim = placement(parameter, ranks, is_expert).dim
    length, rest = parameter.shape[dim], parameter.numel() // max(parameter.shape[dim], 1)
    own = -(-length // ranks) * rest
    if not fp8:
        return Shard(own * ranks, own, dim != 0)
    kept = kept_bytes(parameter.shape, own, dim, is_expert)
    return Shard(own * ranks, own, dim != 0, kept, n_blocks(parameter.shape, is_expert))


class Sharding:
    """FSDP2's doings, entered in a ledger as they happen: bytes held and bytes exchanged."""

    def __init__(
        self, ledger: Ledger, home: Ledger, item_bytes: int, replicas: int, gloo: bool
    ) -> None:
        """home: where shards and their gradients live; another ledger than `ledger` if on the
        host. item_bytes: of the dtype of computation. gloo: whether it does the exchanges."""
        self.ledger, self.home, self.item = ledger, home, item_bytes
        self.replicas, self.gloo = replicas, gloo
        self.has_grads = False
        """Gradients of an earlier microbatch are there to add to."""
        self.held = 0
        """Flat output that is kept until the next copy in forward."""
        self.input = 0
        """Flat input of the last reduction."""
        self.summed = 0
        """Reduced gradients that all-reduces over replicas keep to the end of backward."""
        self.done: list[Group] = []

    def gather(self, group: Group) -> None:
        """Start to gather a group."""
        if group.gathering or group.gathered:
            return
        group.gathering = True
        if group.ranks > 1:
            self.ledger.tp_comm(group.axis, ALL_GATHER, group.gathered_bytes(self.item))
            casts = sum(group.cast_bytes(self.item))
            self._add(GATHERED, casts)
            self._add(GATHERED, group.gathered_bytes(self.item))
            self._add(GATHERED, -casts)

    def use(self, group: Group, forward: bool) -> None:
        """Gather a group to the end: its parameters are there."""
        self.gather(group)
        if not group.gathering:
            return
        group.gathering, group.gathered = False, True
        if forward:
            self._release_held()
        whole = group.gathered_bytes(self.item)
        self._add(GATHERED, whole)
        if group.ranks > 1:
            moved = group.gathered_bytes(self.item, moved=True)
            self._add(GATHERED, moved)
            self._add(GATHERED, -moved)
            if forward:
                self.held = whole
            else:
                self._add(GATHERED, -whole)
        else:
            largest = max(group.cast_bytes(self.item), default=0)
            self._add(GATHERED, largest)
            self._add(GATHERED, -largest)

    def free(self, group: Group) -> None:
        """Free the parameters of a group."""
        if group.gathered:
            group.gathered = False
            self._add(GATHERED, -group.gathered_bytes(self.item))

    def end_forward(self, group: Group) -> None:
        """A group has run in forward."""
        if not group.keeps:
            self.free(group)
        group.places.append(len(self.done))
        self.done.append(group)

    def end_all_forward(self) -> None:
        """The root has run in forward."""
        self._release_held()

    def begin_backward(self, group: Group, ahead: bool) -> None:
        """The first gradient reaches a group. ahead: gather the one that follows."""
        self.use(group, forward=False)
        if ahead and group.places:
            place = group.places.pop()
            if place:
                self.gather(self.done[place - 1])

    def reduce(self, group: Group) -> None:
        """The gradients of a group are complete; they are about to be given up."""
        self.free(group)
        self._add(REDUCTION, -self.input)
        self.input = group.whole * 4
        moved = max((s.whole for s in group.shards if s.moved), default=0)
        if group.ranks > 1:
            self._add(REDUCTION, moved * self.item)
            self._add(REDUCTION, -moved * self.item)
        self._add(REDUCTION, self.input)

    def reduced(self, group: Group) -> None:
        """The gradients were given up."""
        part = group.own * 4
        if group.ranks > 1:
            self.ledger.tp_comm(group.axis, REDUCE_SCATTER, group.whole * 4)
        if self.replicas > 1:
            self.ledger.tp_comm("dp_replicate", ALL_REDUCE, part)
        # torch's loop over the gradients still has its hands on the last one; gloo copies its
        # input, and torch does where it divides by a factor itself
        copies = self.gloo if group.ranks > 1 else self.replicas > 1
        passing = group.shards[-1].whole * self.item + self.input * copies
        self._add(REDUCTION, part + passing)
        self._add(REDUCTION, -passing)
        if self.has_grads or self.home is not self.ledger:
            if self.replicas > 1:
                self.summed += part
            else:
                self._add(REDUCTION, -part)
            if not self.has_grads:
                self.home.add("gradients", part)
        else:
            self._add(REDUCTION, -part)
            self.home.add("gradients", part)

    def end_backward(self, groups: Iterable[Group]) -> None:
        """After the reduction of the last group."""
        self._add(REDUCTION, -self.input - self.summed)
        self.input = self.summed = 0
        self.has_grads = True
        self.done.clear()
        for group in groups:
            self.free(group)
            if group.gathering:
                group.gathering = False
                self._add(GATHERED, -group.gathered_bytes(self.item) * (group.ranks > 1))
            group.places.clear()
        self._release_held()

    def quantize(self, groups: Iterable[Group]) -> None:
        """The ranks of a group agree on the scales of weights in FP8, once per step."""
        for group in groups:
            if group.ranks > 1:
                n_bytes = 4 * sum(shard.blocks for shard in group.shards)
                self.ledger.tp_comm(group.axis, ALL_REDUCE, n_bytes)

    def _release_held(self) -> None:
        self._add(GATHERED, -self.held)
        self.held = 0

    def _add(self, kind: str, n_bytes: int) -> None:
        self.ledger.add(kind, n_bytes)

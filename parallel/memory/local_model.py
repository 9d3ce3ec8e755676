"""One rank's part of a model without the other ranks: the shapes and seams that `parallel.apply`
would give it, with nothing of `torch.distributed` started.

Weights are on the meta device and plain, in the shape of this rank's part. The exchanges are those
of `parallel.tensor` and `parallel.dispatch`, over groups that only know their size.
"""

import math
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from configs.dispatch import DispatchConfig
from configs.parallel_dims import ParallelDims
from configs.schema import JobConfig
from kernels.grouped_gemm.grouped_gemm_fp8 import row_alignment
from models.attention import GroupedQueryAttention, LatentAttention
from models.block import Block
from models.decoder import Decoder
from models.fp8 import apply_fp8
from models.moe import Dispatcher, Experts, FeedForward, LocalDispatcher, MoE
from models.mtp import MtpModule
from models.tp_comm import TPComm
from parallel.dispatch.all_to_all import AllToAll
from parallel.dispatch.gathering import GatheringDispatcher
from parallel.dispatch.hierarchical import Hierarchical
from parallel.dispatch.packed_rows import DispatchCounters, RowAllToAll
from parallel.dispatch.plan import Planner, RoutedDispatcher
from parallel.dispatch.sync_free import SyncFree
from parallel.expert import DIMS
from parallel.fp8_weights import check_divided
from parallel.memory.shadow import ALL_GATHER, ALL_REDUCE
from parallel.recompute import apply_recompute
from parallel.tensor import HEADS, TPGroupComm, VocabularyEmbedding

NODES, NODE = "ep between nodes", "ep in a node"
"""The groups of `hierarchical` dispatch."""
_RANKS_PER_NODE = 8
"""Where the experiment does not say."""


class SizedGroup:
    """What a process group tells: its name, how many ranks it has, and that this is the first."""

    def __init__(self, group_name: str, size: int) -> None:
        self.group_name, self._size = group_name, size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0

    def allreduce(self, tensors: Any, *_: Any) -> None:
        """In place: nothing changes."""
        for tensor in tensors:
            tensor.entry.mode.ledger.tp_comm(self.group_name, ALL_REDUCE, tensor.nbytes)

    def allgather(self, got: Any, mine: Any, *_: Any) -> None:
        """Counts arrive as every rank alike would send them; data does not exist."""
        for outputs, own in zip(got, mine, strict=True):
            own.entry.mode.ledger.tp_comm(self.group_name, ALL_GATHER, own.nbytes * self._size)
            for output in outputs:
                if not output.content.is_meta:
                    output.content.copy_(own.content)

    all_gather = allgather  # its name from torch 2.13 on


def local_decoder(
    config: JobConfig, parallel_dims: ParallelDims, device: str
) -> tuple[Decoder, set[nn.Module]]:
    """A rank's part of the model on the meta device, and the modules whose own weights the ranks of
    `tp` divide. device: type of the one it is meant for. One block stands for all that are alike,
    so that the time does not grow with the layers."""
    model = _decoder_of_few(config)
    fp8 = config.precision.recipe == "fp8_blockwise"
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    align = 1
    if fp8:
        apply_fp8(model, config.precision.fp8)
        align = row_alignment(device)
    divided: set[nn.Module] = set()
    tp_comm = TPGroupComm(_group("tp", parallel_dims.tp)) if parallel_dims.tp > 1 else None
    for module in list(model.modules()):
        if isinstance(module, Experts):
            _divide_experts(module, parallel_dims)
        elif isinstance(module, MoE):
            module.dispatcher = _dispatcher(module, parallel_dims, config.parallel.dispatch, align)
        if tp_comm is not None:
            if isinstance(getattr(module, "tp_comm", None), TPComm):
                setattr(module, "tp_comm", tp_comm)  # noqa: B010
            divided |= _divide_over_tp(module, parallel_dims.tp)
    if tp_comm is not None:
        _narrow(model.embed, "weight", 0, parallel_dims.tp)
        model.embed.__class__ = VocabularyEmbedding
        setattr(model.embed, "tp_comm", tp_comm)  # noqa: B010
        divided.add(model.embed)
        if model.head is not None:
            _narrow(model.head, "weight", 0, parallel_dims.tp)
            divided.add(model.head)
    if fp8:
        check_divided(model, shapes)
    apply_recompute(model, config.parallel)
    return model, divided


def _decoder_of_few(config: JobConfig) -> Decoder:
    """The model on the meta device, with one block for each kind of block."""
    whole = config.model
    least = replace(whole, n_layers=1, n_dense_layers=0, moe_every=1, mtp_depth=0)
    known = dict[tuple[Any, ...], Block]()
    with torch.device("meta"):
        model = Decoder(least)
        blocks = []
        for i in range(whole.n_layers + whole.mtp_depth):
            kind = _kind(config, i)
            if kind not in known:
                known[kind] = MtpModule(whole) if i >= whole.n_layers else Block(whole, i)
            blocks.append(known[kind])
    model.config = whole
    model.layers, model.mtp = map(
        nn.ModuleList, (blocks[: whole.n_layers], blocks[whole.n_layers :])
    )
    return model


def _kind(config: JobConfig, index: int) -> tuple[Any, ...]:
    """What a block depends on: two of one kind are alike in everything."""
    model, a, fp8 = config.model, config.model.attention, config.precision.fp8
    n_blocks, at = model.n_layers + model.mtp_depth, min(index, model.n_layers - 1)
    kind = (
        index >= model.n_layers, model.is_moe(at), a.is_full(at), a.has_rope(at),
        index % config.parallel.recompute_every == 0,
        fp8.first_bf16 <= index < n_blocks - fp8.last_bf16,
    )  # fmt: skip
    return (*kind, index) if fp8.keep else kind  # patterns tell blocks apart by their names


def _divide_experts(experts: Experts, parallel_dims: ParallelDims) -> None:
    for name, parameter in list(experts._parameters.items()):
        if parameter is not None:
            _narrow(experts, name, DIMS[name]["ep"], parallel_dims.ep)
            _narrow(experts, name, DIMS[name]["etp"], parallel_dims.etp)
            if name == "b2" and parallel_dims.etp > 1:
                _pad_when_read(experts, name, parameter.shape[-1])


def _dispatcher(
    moe: MoE, parallel_dims: ParallelDims, options: DispatchConfig, align: int
) -> Dispatcher:
    n_experts = moe.router.config.n_experts
    dispatcher: Dispatcher = LocalDispatcher(n_experts, align)
    if parallel_dims.ep > 1:
        planner = _planner(n_experts, parallel_dims.ep, options, align)
        dispatcher = RoutedDispatcher(planner, options)
    if parallel_dims.etp > 1:
        dispatcher = GatheringDispatcher(dispatcher, _group("etp", parallel_dims.etp))
    return dispatcher


def _planner(n_experts: int, ep: int, options: DispatchConfig, align: int) -> Planner:
    """What `parallel.dispatch.factory` would make. The buffers of DeepEP are its own: its rows
    are counted as those of the exact exchange."""
    if options.kind == "hierarchical":
        size = options.node_size or math.gcd(ep, _RANKS_PER_NODE)
        traffic = DispatchCounters()
        across = RowAllToAll(_group(NODES, ep // size), [False] * (ep // size), traffic)
        within = RowAllToAll(_group(NODE, size), [False] * size, traffic)
        return Hierarchical(n_experts, _group("ep", ep), across, within, traffic, align)
    link = RowAllToAll(_group("ep", ep), [False] * ep)
    if options.kind == "sync_free":
        return SyncFree(n_experts, link, options.capacity_factor, align)
    return AllToAll(n_experts, link, align)


def _divide_over_tp(module: nn.Module, tp: int) -> set[nn.Module]:
    if isinstance(module, FeedForward):
        _narrow(module, "w13", 1, tp)
        _narrow(module, "w2", 1, tp)
        return {module}
    if not isinstance(module, GroupedQueryAttention | LatentAttention):
        return set()
    found: set[nn.Module] = set()
    for name, dim in HEADS.items():
        projection = getattr(module, name, None)
        if projection is not None:
            _narrow(projection, "weight", dim, tp)
            if projection.bias is not None:
                _narrow(projection, "bias", 0, tp)
                if name == "wo":
                    _pad_when_read(projection, "bias", projection.weight.shape[0])
            found.add(projection)
    if getattr(module, "sinks", None) is not None:
        _narrow(module, "sinks", 0, tp)
        found.add(module)
    return found


def _narrow(module: nn.Module, name: str, dim: int, size: int) -> None:
    parameter = module._parameters[name]
    assert parameter is not None
    shape = list(parameter.shape)
    shape[dim] //= size
    module._parameters[name] = nn.Parameter(torch.empty(shape, device="meta"))


def _pad_when_read(module: nn.Module, name: str, width: int) -> None:
    """As `parallel.sharded_parameters.pad_local` does, for the first rank."""

    def read(module: nn.Module) -> Tensor:
        part = module._parameters[name]
        assert part is not None
        return F.pad(part, (0, width - part.shape[-1]))

    kind = type(module)
    module.__class__ = type(f"Padded{kind.__name__}", (kind,), {name: property(read)})


def _group(name: str, size: int) -> ProcessGroup:
    return cast(ProcessGroup, SizedGroup(name, size))

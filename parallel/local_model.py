"""One rank's part of a model without the other ranks: the shapes and seams that `parallel.apply`
would give it, with nothing of `torch.distributed` started.

Weights are on the meta device and plain, in the shape of this rank's part. The exchanges are those
of `parallel.tensor` and `parallel.dispatch`, over groups that only know their size.
"""

import math
from typing import Any, cast

import torch
from torch import nn
from torch.distributed import ProcessGroup

from configs.degrees import Degrees
from configs.dispatch import Dispatch
from configs.schema import RunConfig
from kernels.grouped_gemm_fp8 import row_alignment
from models.attention import GroupedQueryAttention, LatentAttention
from models.decoder import Decoder
from models.exchange import Exchange
from models.fp8 import apply_fp8
from models.moe import Dispatcher, Experts, FeedForward, LocalDispatcher, MoE
from parallel.dispatch.all_to_all import AllToAll
from parallel.dispatch.exchange import Link, Traffic
from parallel.dispatch.gathering import GatheringDispatcher
from parallel.dispatch.hierarchical import Hierarchical
from parallel.dispatch.route import Planner, RoutedDispatcher
from parallel.dispatch.sync_free import SyncFree
from parallel.expert import DIMS
from parallel.fp8_weights import check_divided
from parallel.recompute import apply_recompute
from parallel.tensor import HEADS, TensorExchange, VocabularyEmbedding

_NODE = 8
"""Ranks of a node, where the experiment does not say."""


class SizedGroup:
    """What a process group tells: how many ranks it has, and that this is the first."""

    group_name = "rehearsal"

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0

    def allreduce(self, *_: Any) -> None:
        """In place: nothing to do."""

    def allgather(self, got: Any, mine: Any, *_: Any) -> None:
        """Counts arrive as every rank alike would send them; data does not exist."""
        for outputs, own in zip(got, mine, strict=True):
            for output in outputs:
                if not output.content.is_meta:
                    output.content.copy_(own.content)

    all_gather = allgather  # its name from torch 2.13 on


def local_decoder(
    config: RunConfig, degrees: Degrees, device: str
) -> tuple[Decoder, set[nn.Module]]:
    """A rank's part of the model on the meta device, and the modules whose own weights the ranks of
    `tp` divide. device: type of the one it is meant for."""
    with torch.device("meta"):
        model = Decoder(config.model)
    fp8 = config.precision.recipe == "fp8_blockwise"
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    align = 1
    if fp8:
        apply_fp8(model, config.precision.fp8)
        align = row_alignment(device)
    divided: set[nn.Module] = set()
    exchange = TensorExchange(_group(degrees.tp)) if degrees.tp > 1 else None
    for module in list(model.modules()):
        if isinstance(module, Experts):
            _divide_experts(module, degrees)
        elif isinstance(module, MoE):
            module.dispatcher = _dispatcher(module, degrees, config.parallel.dispatch, align)
        if exchange is not None:
            if isinstance(getattr(module, "exchange", None), Exchange):
                setattr(module, "exchange", exchange)  # noqa: B010
            divided |= _divide_over_tp(module, degrees.tp)
    if exchange is not None:
        _narrow(model.embed, "weight", 0, degrees.tp)
        model.embed.__class__ = VocabularyEmbedding
        setattr(model.embed, "exchange", exchange)  # noqa: B010
        divided.add(model.embed)
        if model.head is not None:
            _narrow(model.head, "weight", 0, degrees.tp)
            divided.add(model.head)
    if fp8:
        check_divided(model, shapes)
    apply_recompute(model, config.parallel)
    return model, divided


def _divide_experts(experts: Experts, degrees: Degrees) -> None:
    for name, parameter in list(experts._parameters.items()):
        if parameter is not None:
            _narrow(experts, name, DIMS[name]["ep"], degrees.ep)
            if name != "b2":  # is read in full width
                _narrow(experts, name, DIMS[name]["etp"], degrees.etp)


def _dispatcher(moe: MoE, degrees: Degrees, options: Dispatch, align: int) -> Dispatcher:
    n_experts = moe.router.config.n_experts
    dispatcher: Dispatcher = LocalDispatcher(n_experts, align)
    if degrees.ep > 1:
        planner = _planner(n_experts, degrees.ep, options, align)
        dispatcher = RoutedDispatcher(planner, options)
    if degrees.etp > 1:
        dispatcher = GatheringDispatcher(dispatcher, _group(degrees.etp))
    return dispatcher


def _planner(n_experts: int, ep: int, options: Dispatch, align: int) -> Planner:
    """What `parallel.dispatch.factory` would make. The buffers of DeepEP are its own: its rows
    are counted as those of the exact exchange."""
    if options.kind == "hierarchical":
        size = options.node_size or math.gcd(ep, _NODE)
        traffic = Traffic()
        across = Link(_group(ep // size), [False] * (ep // size), traffic)
        within = Link(_group(size), [False] * size, traffic)
        return Hierarchical(n_experts, _group(ep), across, within, traffic, align)
    link = Link(_group(ep), [False] * ep)
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
            if projection.bias is not None and dim == 0:  # that of wo is read in full width
                _narrow(projection, "bias", 0, tp)
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


def _group(size: int) -> ProcessGroup:
    return cast(ProcessGroup, SizedGroup(size))

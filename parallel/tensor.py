"""Tensor parallelism with sequence parallelism: ranks of `tp` divide heads, widths and vocabulary.

| weight | divided along | what a rank makes of it |
|---|---|---|
| wq, wk, wv, wkv_b, their biases, sinks | heads | its heads, for all tokens |
| wo | heads | a partial sum for all tokens |
| w13, w2 of dense and shared feed-forwards | width F | a partial sum for all tokens |
| embedding, head | vocabulary | rows of its words; logits of its words |
| wo's bias | model width D | its slice of the bias, so that the sum over ranks counts it once |

Norms, the router and MLA's compressions are not divided: between the divided layers each rank has
its own tokens (`models.tp_comm`), so to them the ranks of `tp` are so many data ranks, and FSDP2
shards them over `dp_shard * tp` and sums their gradients there.

Communication of one forward pass per rank, in elements of the compute dtype, t = T / tp tokens:
every attention layer and dense or shared feed-forward gathers T * D (MLA: T * (compressed query +
kv_lora_rank + qk_rope_head_dim), narrower) and reduce-scatters T * D; the embedding reduce-scatters
and the head gathers T * D once. Backward does the same with the two exchanged.

arXiv:1909.08053 (tensor), arXiv:2205.05198 (sequence parallelism).
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from models.attention import GroupedQueryAttention, LatentAttention
from models.decoder import Decoder
from models.moe import FeedForward
from models.tp_comm import TPComm
from parallel.sharded_parameters import pad_local, shard_parameters

_c10d = torch.ops._c10d_functional  # each returns a new tensor, so recomputation can keep it
HEADS = {"wq": 0, "wk": 0, "wv": 0, "wkv_b": 0, "wo": 1}
"""The dimension of each projection's weight that runs over heads."""


def apply_tensor_parallel(model: Decoder, mesh: DeviceMesh) -> None:
    """Divide a model on the meta device over the ranks of `mesh` (one axis); names and shapes stay
    logical. Nothing happens where the axis has one rank."""
    if mesh.size() == 1:
        return
    tp_comm = TPGroupComm(mesh.get_group())
    for module in model.modules():
        if isinstance(getattr(module, "tp_comm", None), TPComm):
            setattr(module, "tp_comm", tp_comm)  # noqa: B010 (Module's own attribute types)
        if isinstance(module, GroupedQueryAttention | LatentAttention):
            _divide_attention(module, mesh)
        elif isinstance(module, FeedForward):
            shard_parameters(module, mesh, {"w13": (1,), "w2": (1,)})
    shard_parameters(model.embed, mesh, {"weight": (0,)}, base=VocabularyEmbedding)
    assert isinstance(model.embed, VocabularyEmbedding)
    model.embed.tp_comm = tp_comm
    if model.head is not None:
        shard_parameters(model.head, mesh, {"weight": (0,)})


def _divide_attention(attention: nn.Module, mesh: DeviceMesh) -> None:
    for name, dim in HEADS.items():
        projection = getattr(attention, name, None)
        if projection is None:
            continue
        dims = {"weight": (dim,)} | ({"bias": (0,)} if projection.bias is not None else {})
        shard_parameters(projection, mesh, dims)
        if name == "wo" and projection.bias is not None:
            pad_local(projection, "bias", 0, mesh)
    if getattr(attention, "sinks", None) is not None:
        shard_parameters(attention, mesh, {"sinks": (0,)})


class TPGroupComm(TPComm):
    """The exchange between the ranks of one tensor-parallel group."""

    group: dist.ProcessGroup

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.place = group, group.rank()

    def gather(self, x_tD: Tensor) -> Tensor:
        gathered: Tensor = _Gather.apply(x_tD, self.group)
        return gathered

    def reduce_scatter(self, y_TD: Tensor) -> Tensor:
        scattered: Tensor = _ReduceScatter.apply(y_TD, self.group)
        return scattered

    def sum(self, values: Tensor) -> Tensor:
        total: Tensor = _c10d.wait_tensor(_c10d.all_reduce(values, "sum", self.group.group_name))
        return total


class VocabularyEmbedding(nn.Embedding):
    """An embedding that holds the rows of some words; all ranks look up all tokens together."""

    tp_comm: TPGroupComm

    def forward(self, tokens_T: Tensor) -> Tensor:
        """The embeddings of this rank's tokens, `[t, D]`."""
        weight_vD = self.weight
        first = self.tp_comm.place * weight_vD.shape[0]
        index_T = tokens_T - first
        mine_T = (index_T >= 0) & (index_T < weight_vD.shape[0])
        rows_TD = F.embedding(index_T.where(mine_T, 0), weight_vD)
        return self.tp_comm.reduce_scatter(rows_TD * mine_T[:, None])


def _gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    pieces = _c10d.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name)
    gathered: Tensor = _c10d.wait_tensor(pieces)
    return gathered


def _reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    piece = _c10d.reduce_scatter_tensor(x.contiguous(), "sum", group.size(), group.group_name)
    scattered: Tensor = _c10d.wait_tensor(piece)
    return scattered


class _Gather(torch.autograd.Function):
    """All-gather of rows; the gradient of a rank's rows is the sum of what every rank made."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grad, ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    """Sum over ranks, of which each keeps its rows; every addend's gradient is that of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.group), None

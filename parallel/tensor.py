"""Tensor parallelism with sequence parallelism: ranks of `tp` divide heads, widths and vocabulary,
along the dimension `tp` of `models.parameters`.

| weight | divided along | result on a rank |
|---|---|---|
| wq, wk, wv, wkv_b, their biases, sinks | heads | its heads, for all tokens |
| wo | heads | a partial sum for all tokens |
| w13, w2 of dense and shared feed-forwards | width F | a partial sum for all tokens |
| embedding, head | vocabulary | rows of its tokens; logits of its tokens |
| wo's bias | model width D | its slice of the bias, so that the sum over ranks counts it once |

Norms, the router and MLA's compressions are not divided: between the divided layers each rank has
different tokens (`models.tp_comm`), so for them the ranks of `tp` are data ranks, and FSDP2 shards
them over `dp_shard * tp` and sums their gradients there.

Communication of one forward pass per rank, in elements of the compute dtype, t = T / tp tokens:
every attention layer and dense or shared feed-forward gathers T * D (MLA: T * (compressed query +
kv_lora_rank + qk_rope_head_dim), narrower) and reduce-scatters T * D; the embedding reduce-scatters
and the head gathers T * D once. Backward does the same with gather and reduce-scatter swapped.

arXiv:1909.08053 (tensor), arXiv:2205.05198 (sequence parallelism).
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from models.decoder import Decoder
from models.layers.embedding import Embedding
from models.layers.local_view import LocalViews
from models.parameters import spec_of
from models.tp_comm import TPComm
from parallel.sharded_parameters import pad_local, shard_parameters
from parallel.waiting import wait_tensor

_c10d = torch.ops._c10d_functional  # each returns a new tensor, so recomputation can keep it


def apply_tensor_parallel(
    model: Decoder, mesh: DeviceMesh, comm: "type[TPGroupComm] | None" = None
) -> None:
    """Divide a model on the meta device over the ranks of `mesh` (one axis); names and shapes stay
    logical. With one rank nothing changes. comm: by default `TPGroupComm`."""
    if mesh.size() == 1:
        return
    tp_comm = (comm or TPGroupComm)(mesh.get_group())
    for module in model.modules():
        if isinstance(getattr(module, "tp_comm", None), TPComm):
            setattr(module, "tp_comm", tp_comm)  # noqa: B010 (Module's own attribute types)
    model.embed = VocabularyEmbedding(model.embed, tp_comm)
    for name, module in model.named_modules():
        own = [key for key, _ in module.named_parameters(recurse=False)]
        specs = {key: spec_of(f"{name}.{key}") for key in own}
        dims = {key: spec.tp for key, spec in specs.items() if spec.tp is not None}
        if not dims:
            continue
        assert isinstance(module, LocalViews), name
        shard_parameters(module, mesh, {key: (dim,) for key, dim in dims.items()})
        for key, dim in dims.items():
            if specs[key].padded:
                pad_local(module, key, dim, mesh)


class TPGroupComm(TPComm):
    """Communication between the ranks of one tensor-parallel group."""

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
        total: Tensor = wait_tensor(_c10d.all_reduce(values, "sum", self.group.group_name))
        return total


class RankOrderComm(TPGroupComm):
    """For inference: a sum over ranks adds them in their order, in fp32, and is rounded once.

    The libraries' reductions add three or more ranks in an order that depends on an element's place
    in the message, so the bits of a token would depend on its place in the batch. Here each rank
    receives the addends of its tokens, which are as many bytes as a reduce-scatter exchanges. Two
    addends have the same sum in both orders: then the bits are those of `TPGroupComm`.
    """

    def reduce_scatter(self, y_TD: Tensor) -> Tensor:
        n = self.group.size()
        even = [len(y_TD) // n] * n
        received = _c10d.all_to_all_single(y_TD.contiguous(), even, even, self.group.group_name)
        first, *others = wait_tensor(received).chunk(n)
        total_tD = first.float()
        for addend_tD in others:
            total_tD = total_tD + addend_tD
        return total_tD.to(y_TD.dtype)


class VocabularyEmbedding(Embedding):
    """An embedding with the rows of some tokens; all ranks look up all tokens together."""

    def __init__(self, whole: Embedding, tp_comm: TPGroupComm) -> None:
        """whole: on the meta device."""
        size = whole.num_embeddings, whole.embedding_dim
        super().__init__(*size, device="meta", dtype=whole.weight.dtype)
        self.tp_comm = tp_comm

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
    gathered: Tensor = wait_tensor(pieces)
    return gathered


def _reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    piece = _c10d.reduce_scatter_tensor(x.contiguous(), "sum", group.size(), group.group_name)
    scattered: Tensor = wait_tensor(piece)
    return scattered


class _Gather(torch.autograd.Function):
    """All-gather of rows; the gradient of a rank's rows is the sum of the gradients of all
    ranks."""

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

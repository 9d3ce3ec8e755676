"""One rank's part of a model, rehearsed on tensors without data (`parallel.memory.shadow`).

Blocks of one kind (dense or experts, full or local attention, recomputed or not) behave alike, so
one of each runs, forward and backward; what it holds in between and at most is recorded in traces,
with marks where FSDP2 gathers and reduces (`train.memory` puts them together). All ranks are taken
to be alike, and the expert choice is given: even, or as uneven as it can be.

T tokens of the ranks of `tp` together, t of one rank, K experts per token, D width.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from configs.parallel_dims import ParallelDims
from configs.schema import JobConfig
from kernels.fp8 import BLOCK
from kernels.gemm.linear_fp8 import Fp8Weight
from kernels.layers.cross_entropy import linear_cross_entropy
from models.attention import GroupedQueryAttention, LatentAttention, layer_of
from models.balance import StepScope
from models.decoder import Decoder, Output
from models.documents import DocumentAttention
from models.fp8 import WEIGHTS
from models.layers.linear import Fp8Module, as_matrices
from models.layers.rope import rope_tables
from models.moe import Experts, FeedForward, MoE, Rows
from models.mtp import MtpModule
from models.router import routers
from parallel.dispatch.overflow import exact
from parallel.memory.fused_shadows import FusedKernels
from parallel.memory.local_model import local_decoder
from parallel.memory.shadow import Shadows, Trace, extrapolate
from parallel.memory.stand_ins import Behind, Documents, GivenChoice, Handed

EXPERTS, EXPERTS_DONE, EXPERTS_BACK = "experts", "experts done", "experts backward"
"""Marks where the experts of a block begin and end, and where their backward begins."""
REDUCE, REDUCED = "reduce", "reduced"
"""Marks before and after the gradients of a group of parameters are given up."""
MASKS, BACKWARD = "attention masks", "running backward"
"""Kinds of memory."""
LAYERS, MTP = "layers", "MTP module"
"""Marks in the trace of the ends of a model: where its blocks run."""
_FEW_ROWS = 2**20
"""Rows of experts whose numbers (8 bytes, several times) are no burden."""
_FEW_LOGITS = 2**26
"""Logits of some tens of chunks on a CPU."""


@dataclass(frozen=True)
class Traces:
    """What a step allocates on one rank, apart from states and FSDP2's buffers."""

    kinds: list[int]
    """For each block the first block of its kind, under whose index its traces are."""
    blocks: dict[int, tuple[Trace, Trace]]
    """Forward and backward."""
    masks: dict[int, Trace]
    """Building the attention mask, for the first block to need it."""
    ends: tuple[Trace, Trace]
    """Embedding, norm and loss, forward and backward."""


class Rehearsal:
    """Runs the parts of a model on shadows."""

    def __init__(
        self, config: JobConfig, parallel_dims: ParallelDims, device: str, compute: torch.dtype
    ) -> None:
        """device: `cpu`, or anything else for an accelerator with torch's fused kernels."""
        self.config, self.parallel_dims, self.compute = config, parallel_dims, compute
        self.model, self.divided = local_decoder(config, parallel_dims, device)
        self.blocks = self.model.blocks()
        self.shadows = Shadows("cpu" if device == "cpu" else "meta")
        self.fused = device != "cpu"
        self.mark: Callable[[str], None] = lambda name: None
        self.chunks_sent = self.chunks_away = 0
        """Parts of a block's rows that went through its experts in forward, and of those the ones
        whose gradients have yet to come."""
        self.n_tokens = config.train.micro_batch * config.data.seq_len
        self.own_tokens = self.n_tokens // parallel_dims.tp
        self._watch(self.model)

    def run(self) -> tuple[Traces, Traces]:
        """Every part once; with even loads of the experts, and with the most uneven."""
        model, train = self.config.model, self.config.train
        with self.shadows, FusedKernels() if self.fused else nullcontext():
            shape = (train.micro_batch, self.config.data.seq_len)
            positions_BL = self.shadows.given(*shape, dtype=torch.int64)
            positions_T, core = positions_BL.view(-1), Documents(positions_BL)
            tables = rope_tables(positions_T, model.rope, model.attention.rope_dim)
            kinds = self._kinds()
            masks = self._masks(kinds, core)
            arguments = (positions_T, tables, core)
            even = {i: self._block(i, self._even_choice(), *arguments) for i in set(kinds)}
            with exact(self.model) if self._may_redo() else nullcontext():
                uneven = {i: self._uneven(i, *arguments) for i in set(kinds)}
            ends = self._ends(core)
        return Traces(kinds, even, masks, ends), Traces(kinds, uneven, masks, ends)

    def _may_redo(self) -> bool:
        """Whether a step whose rows found no room is redone on the exact path."""
        options = self.config.parallel.dispatch
        return (
            options.kind == "sync_free"
            and options.on_overflow == "redo"
            and self.parallel_dims.ep > 1
        )

    def _masks(self, kinds: list[int], core: DocumentAttention) -> dict[int, Trace]:
        found: dict[int, Trace] = {}
        for index in sorted(set(kinds)):
            layer_index = min(index, self.config.model.n_layers - 1)  # an MTP module's is the last
            known, layer = len(core._masks), layer_of(self.config.model, layer_index)
            trace = self._record(MASKS, partial(core.mask, layer))
            if len(core._masks) > known:
                found[index] = trace
        return found

    def _kinds(self) -> list[int]:
        """The first block that is like each block."""
        model, every = self.config.model, self.config.parallel.recompute_every
        a, first = model.attention, dict[tuple[bool, ...], int]()
        kinds = []
        for i, block in enumerate(self.blocks):
            at = min(i, model.n_layers - 1)
            is_mtp = isinstance(block, MtpModule)
            kind = (is_mtp, model.is_moe(at), a.is_full(at), a.has_rope(at), i % every == 0)
            kinds.append(first.setdefault(kind, i))
        return kinds

    def _record(self, kind: str, run: Callable[[], Any]) -> Trace:
        ledger = self.shadows.ledger

        def marked(mark: Callable[[str], None]) -> None:
            self.mark = mark
            run()

        ledger.kinds.append(kind)
        trace = ledger.record(marked)
        ledger.kinds.pop()
        return trace

    def _block(self, index: int, ids_tK: Tensor, *arguments: Any) -> tuple[Trace, Trace]:
        block, shape = self.blocks[index], (self.own_tokens, self.config.model.d_model)
        self._give_weights(block)
        self._give_choice(block, ids_tK)
        n_inputs = 2 if isinstance(block, MtpModule) else 1  # and embeddings
        inputs = [self.shadows.given(*shape, dtype=self.compute) for _ in range(n_inputs)]
        outputs: list[Tensor] = []

        def run() -> None:
            self.chunks_sent = 0
            outputs.append(block(*(x.requires_grad_() for x in inputs), *arguments))

        def back() -> None:
            outputs.clear()
            self.chunks_away = self.chunks_sent
            torch.autograd.backward(edge, given)
            self._give_up_grads(block)

        forward = self._record("residual stream", run)
        # the gradient exists before: the block behind this one has made it
        self.shadows.ledger.add(BACKWARD, outputs[0].nbytes)
        given = self.shadows.given(*shape, dtype=self.compute)
        edge = get_gradient_edge(Handed.apply(outputs[0], self.shadows.ledger, BACKWARD))
        return forward, self._record(BACKWARD, back)

    def _uneven(self, index: int, *arguments: Any) -> tuple[Trace, Trace]:
        """A block whose first experts get all tokens of all ranks. So many rows may come that
        their numbers alone would fill this machine: then it is run at two smaller loads."""
        moe, d = self.config.model.moe, self.parallel_dims
        sent = self.own_tokens * d.etp * min(moe.top_k, moe.n_experts // d.ep)
        small, worst = max(_FEW_ROWS, sent), sent * d.ep
        if worst <= 2 * small:
            return self._block(index, self._one_choice(1.0), *arguments)
        low = self._block(index, self._one_choice(small / worst), *arguments)
        high = self._block(index, self._one_choice(2 * small / worst), *arguments)
        factor = worst / small - 1
        return extrapolate(low[0], high[0], factor), extrapolate(low[1], high[1], factor)

    def _ends(self, core: DocumentAttention) -> tuple[Trace, Trace]:
        """Embedding, norm and loss. On a CPU the loss goes through the tokens in chunks so small
        that they are all too many; there, what fewer tokens need tells the rest."""
        model = self.model
        model.layers = nn.ModuleList([_Place(self, LAYERS)])
        model.mtp = nn.ModuleList(_Place(self, MTP) for _ in model.mtp)
        few = self.parallel_dims.tp * max(_FEW_LOGITS // model.config.vocab_size, 1)
        if self.fused or self.n_tokens <= 2 * few:
            return self._ends_of(self.n_tokens, core)
        low, high = self._ends_of(few, core), self._ends_of(2 * few, core)
        factor = self.n_tokens / few - 1
        return extrapolate(low[0], high[0], factor), extrapolate(low[1], high[1], factor)

    def _ends_of(self, n_tokens: int, core: DocumentAttention) -> tuple[Trace, Trace]:
        model = self.model
        self._give_weights(model)
        tokens_T, positions_T, targets_T = (
            self.shadows.given(n_tokens, dtype=torch.int64) for _ in range(3)
        )
        losses: list[Tensor] = []

        def output(x_TD: Tensor, head_VD: Tensor) -> Tensor:
            self.shadows.ledger.kinds[-1] = "logits and loss"
            return linear_cross_entropy(x_TD, head_VD, targets_T, model.tp_comm.group)

        def run() -> None:
            mtp_outputs: list[tuple[Tensor, Output]] = [(tokens_T, output) for _ in model.mtp]
            found = model(tokens_T, positions_T, core, output, mtp_outputs)
            losses.append(torch.stack(found).sum() if mtp_outputs else found)

        def back() -> None:
            losses.pop().backward()
            self._give_up_grads(model)

        forward = self._record("embedding and last norm", run)
        return forward, self._record(BACKWARD, back)

    def _give_up_grads(self, module: nn.Module) -> None:
        self.mark(REDUCE)
        for parameter in module.parameters():
            parameter.grad = None
        self.mark(REDUCED)

    def _give_weights(self, module: nn.Module) -> None:
        """Make the weights shadows in the dtype of computation; FSDP2 accounts for them, also for
        those in FP8."""
        for part in module.modules():
            if isinstance(part, Fp8Module):
                part.sources = {
                    name: partial(self._fp8_weight, as_matrices(name, getattr(part, name)).shape)
                    for name in WEIGHTS
                    if name in part._parameters
                }
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    weight = self.shadows.given(*parameter.shape, dtype=self.compute)
                    part._parameters[name] = nn.Parameter(weight)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = self.shadows.given(*buffer.shape, dtype=buffer.dtype)

    def _fp8_weight(self, shape: torch.Size) -> Fp8Weight:
        data = self.shadows.given(*shape, dtype=torch.float8_e4m3fn)
        grid = (*shape[:-2], *(-(-size // BLOCK) for size in shape[-2:]))
        return Fp8Weight(data, data, self.shadows.given(*grid, dtype=torch.float32))

    def _give_choice(self, block: nn.Module, ids_tK: Tensor) -> None:
        tokens = self.shadows.given(dtype=torch.int64)
        scope = StepScope(self.config.data.seq_len, tokens, lambda counts: counts)
        for router in routers(block):
            router.scope = scope
            router.__class__ = GivenChoice
            setattr(router, "given_tK", ids_tK)  # noqa: B010 (Module's own attribute types)

    def _even_choice(self) -> Tensor:
        """Expert ids `[t, K]` with as many tokens for every rank of `ep`, and about as many for
        every expert.

        Not exactly: where groups of rows are aligned, loads that are all alike would all fill
        their last rows, or all leave them half empty. Of two neighbours one has more by as much as
        the other has less.
        """
        moe = self.config.model.moe
        n_rows, experts = self.own_tokens * moe.top_k, torch.arange(moe.n_experts)
        n_local = moe.n_experts // self.parallel_dims.ep
        pair_E = experts % n_local // 2
        more_E = (pair_E * 13 % 16 + 1) * (1 - 2 * (experts % n_local % 2))
        more_E[pair_E == n_local // 2] = 0  # the last of an odd number
        ids_R = experts.repeat_interleave((more_E + n_rows // moe.n_experts).clamp(min=0))
        more = experts.repeat(n_rows // moe.n_experts + 1)
        return torch.cat([ids_R, more])[:n_rows].view(-1, moe.top_k)

    def _one_choice(self, share: float) -> Tensor:
        """Expert ids `[t, K]`: a share of the tokens chooses the first experts, the others the
        last, which are on another rank."""
        moe = self.config.model.moe
        first = torch.arange(moe.top_k)
        is_first = torch.arange(self.own_tokens)[:, None] < round(share * self.own_tokens)
        return torch.where(is_first, first, moe.n_experts - 1 - first)

    def _watch(self, model: Decoder) -> None:
        """Name the kind of what the parts of a block allocate; set the marks around experts."""
        ledger = self.shadows.ledger
        for module in model.modules():
            kind = next((kind for type_, kind in _KINDS.items() if isinstance(module, type_)), None)
            if kind is not None:
                module.register_forward_pre_hook(lambda *_, kind=kind: ledger.kinds.append(kind))
                module.register_forward_hook(lambda *_: _pop(ledger.kinds), always_call=True)
            if isinstance(module, Experts) and self.parallel_dims.tp * self.parallel_dims.ep > 1:
                module.register_forward_pre_hook(self._before_experts)
                module.register_forward_hook(self._after_experts)

    def _before_experts(self, experts: nn.Module, arguments: tuple[Rows]) -> tuple[Rows]:
        self.mark(EXPERTS)
        rows = arguments[0]
        self.chunks_sent += 1

        def done() -> None:
            self.chunks_away -= 1
            if not self.chunks_away:  # autograd hands over the sum of what all chunks gave
                self._give_up_grads(experts)

        data, weights_R = Behind.apply(done, rows.data, rows.weights_R)
        return (rows._replace(data=data, weights_R=weights_R),)

    def _after_experts(self, experts: nn.Module, arguments: Any, output: Tensor) -> None:
        self.mark(EXPERTS_DONE)
        if output.requires_grad:
            output.register_hook(lambda grad: self.mark(EXPERTS_BACK))


class _Place(nn.Module):
    """Stands where blocks are."""

    def __init__(self, rehearsal: Rehearsal, name: str) -> None:
        super().__init__()
        self.rehearsal, self.name = rehearsal, name

    def _mark(self) -> None:
        self.rehearsal.mark(self.name)

    def forward(self, x_tD: Tensor, beside: Tensor, *_: Any) -> Tensor:
        """beside: an MTP module's embeddings; else positions."""
        self._mark()
        inputs = (x_tD, beside) if self.name == MTP else (x_tD,)
        x: Tensor = Behind.apply(self._mark, *inputs)[0]
        return x


def _pop(kinds: list[str]) -> None:
    kinds.pop()


_KINDS: dict[type[nn.Module], str] = {
    GroupedQueryAttention: "attention",
    LatentAttention: "attention",
    MoE: "routing and dispatch",
    Experts: "experts",
    FeedForward: "dense feed-forward",
}

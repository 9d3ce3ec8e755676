"""Predicts the peak memory of a rank during a step, and the bytes it exchanges.

The training step itself runs, on tensors without data and ranks that do not exist
(`parallel.memory`). The second step is traced, when AdamW has its moments; of several microbatches
the last, when there are gradients to add to.

The memory of tensors is counted. Not counted: rounding and fragmentation of the allocator,
workspaces of libraries, buffers of NCCL, Python and torch themselves.

Exchanged bytes are the input of a collective or, for a gather, its output: the larger side. Not
counted: the sums of a few numbers per step (loss, norm of the gradients, loads).
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import count, product
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from configs.parallel_dims import ParallelDims
from configs.schema import JobConfig
from kernels.layers import cross_entropy
from parallel.fsdp.accumulation import Accumulation
from parallel.memory.fake_group import fake_group
from parallel.memory.model import BATCH, GRADIENTS, MASKS, MOMENTS, PARAMETERS, TracedModel
from parallel.memory.routing import chosen, even, one_sided
from parallel.memory.timeline import Needs, extrapolate, needs_of
from parallel.memory.tracker import Segment
from train.data.batches import Batch, sequence_batch
from train.dataset.sequences import sequences_of
from train.optim.optimizer import build_optimizer
from train.step import train_step

_FEW_ROWS = 2**20
"""Rows of experts whose index tensors (8 bytes, several times) are small."""
_MOST_CHUNKS = 64
"""Maximum number of loss chunks: more are traced as this many larger ones."""
_RANKS_PER_NODE = 8
"""Default if the experiment does not set it."""


def predict(
    config: JobConfig, parallel_dims: ParallelDims, device: str, compute: torch.dtype
) -> tuple[Needs, Needs]:
    """Memory and communication of a rank in a step, for even loads of the experts and for the worst
    case: all tokens of all ranks choose the same experts, which are on this rank.

    device: `cpu` or `cuda`. compute: dtype of forward and backward. Raises ValueError if a process
    group is running.
    """
    config = _traceable(config, parallel_dims)
    dispatch = config.parallel.dispatch
    is_limited = dispatch.kind == "sync_free" and parallel_dims.ep > 1
    # one rank more than the mesh: the default group, which adds up a few numbers, is no axis
    with fake_group(parallel_dims.world + 1):
        step = _Step(config, parallel_dims, device, compute)
        evenly = step.evenly()
        if is_limited and dispatch.on_overflow == "stop":
            return evenly, evenly  # the capacity is fixed for any choice
        if is_limited:
            exact = replace(config.parallel, dispatch=replace(dispatch, kind="all_to_all"))
            step = _Step(replace(config, parallel=exact), parallel_dims, device, compute)
        return evenly, step.needs(step.worst())


def predict_even(
    config: JobConfig, parallel_dims: ParallelDims, device: str, compute: torch.dtype
) -> Needs:
    """The first result of `predict` alone, in less time. Arguments and errors are the same."""
    config = _traceable(config, parallel_dims)
    with fake_group(parallel_dims.world + 1):
        return _Step(config, parallel_dims, device, compute).evenly()


def predict_stages(
    config: JobConfig, parallel_dims: ParallelDims, device: str, compute: torch.dtype
) -> dict[tuple[int, int], Needs]:
    """What a rank needs in every ZeRO stage of dense weights and of experts, for even loads.

    Arguments as for `predict`.
    """
    found = {}
    for dense, experts in product((3, 2, 1), repeat=2):
        parallel = replace(config.parallel, zero_stage=dense, expert_zero_stage=experts)
        one = replace(config, parallel=parallel)
        found[dense, experts] = predict_even(one, parallel_dims, device, compute)
    return found


def _traceable(config: JobConfig, parallel_dims: ParallelDims) -> JobConfig:
    """Replace settings that cannot be traced: compilation, and the buffers of DeepEP; its rows are
    counted as those of the exact exchange."""
    dispatch = config.parallel.dispatch
    if dispatch.kind == "deepep":
        dispatch = replace(dispatch, kind="all_to_all")
    if dispatch.kind == "hierarchical" and not dispatch.node_size:
        sizes = [
            n
            for n in range(1, _RANKS_PER_NODE + 1)
            if parallel_dims.ep % n == 0 and n < parallel_dims.ep
        ]
        dispatch = replace(dispatch, node_size=max(sizes, default=0))
    return replace(config, parallel=replace(config.parallel, dispatch=dispatch, compile=False))


_Trace = list[list[Segment]]
"""Segments of the microbatches of a step that differ, the last one with the rest of the step."""


class _Step:
    """Steps of one rank, traced one after another."""

    def __init__(
        self, config: JobConfig, parallel_dims: ParallelDims, device: str, compute: torch.dtype
    ) -> None:
        self.config, self.parallel_dims, self.device = config, parallel_dims, device
        train = config.train
        self.passes = train.global_batch // (train.micro_batch * parallel_dims.data_ranks)
        self.own_tokens = train.micro_batch * config.data.seq_len // parallel_dims.tp
        self.traced = TracedModel(config, parallel_dims, device, compute)
        self.model = self.traced.module
        self.accumulation = Accumulation(self.model, config.parallel)
        self.differ = self.passes > 1 and self.accumulation.keeps_anything
        """Whether the microbatches of a step keep and communicate different things."""
        with self.traced.tracing():
            self.optimizer = build_optimizer(self.model, config.optimizer, config.precision.moments)
            self.traced.give_gradients()
            self.optimizer.register_step_pre_hook(lambda *_: self.traced.enter(MOMENTS))
            self.optimizer.register_step_post_hook(lambda *_: self.traced.leave())
            self.optimizer.step()  # creates the moments
            self.optimizer.zero_grad()
            self.traced.refresh()

    def evenly(self) -> Needs:
        """What a step needs in which every expert gets as many tokens as any other."""
        loads = even(self.config.model.moe, self.parallel_dims.ep, self.own_tokens)
        return self.needs(self.trace(loads))

    def worst(self) -> _Trace:
        """A step in which the first experts get all tokens of all ranks. If that is so many rows
        that their indices alone would fill this machine's memory, it is extrapolated from two
        smaller loads."""
        moe, d = self.config.model.moe, self.parallel_dims
        sent = self.own_tokens * d.etp * min(moe.top_k, moe.n_experts // d.ep)
        small, worst = max(_FEW_ROWS, sent), sent * d.ep
        if worst <= 2 * small:
            return self.trace(one_sided(moe, self.own_tokens))
        shares = (small / worst, 2 * small / worst)
        low, high = (self.trace(one_sided(moe, self.own_tokens, share)) for share in shares)
        factor = worst / small - 1
        return [extrapolate(*both, factor) for both in zip(low, high, strict=True)]

    def trace(self, ids_TK: Tensor) -> _Trace:
        """The last of a step's microbatches, and the rest of the step, with that choice of
        experts; if they differ, the first and another one precede it."""
        train, batch = self.config.train, self._batch()
        n_traced = min(self.passes, 3) if self.differ else 1
        begun, earlier = count(1), _Trace()

        def begin() -> bool:
            """Called before every microbatch."""
            number = next(begun)
            if number > 1:
                earlier.append(self.traced.next_microbatch())
            if number == n_traced:
                self.held = self.traced.held(self._states())
            return False

        with self.traced.tracing(), chosen(ids_TK), self._few_chunks():
            if self.passes > 1 and not self.differ:
                self.traced.give_gradients()
            with self.traced.category(BATCH):
                batch = batch.to(self.traced.tracker.device)
            self.held = self.traced.held(self._states())
            last = self.traced.trace(
                batch.core,
                lambda: train_step(
                    self.model, self.optimizer, [batch] * n_traced, step=1, rank=0,
                    tp_size=self.parallel_dims.tp, clip_norm=train.clip_norm,
                    mtp_weight=train.mtp_weight, z_loss_coef=train.z_loss_coef,
                    stop=begin if self.differ else lambda: False, updated=self.traced.refresh,
                    accumulation=self.accumulation,
                ),
            )  # fmt: skip
            masks = batch.core.mask_bytes
        # the earlier microbatches are in memory until the end of the step
        self.held[MASKS] += (self.passes - 1) * masks
        self.held[BATCH] *= self.passes
        # counts of choices (int64) and three losses of the MoE layers that are not traced
        absent_moe = sum(
            self.traced.layers.times[place] - 1
            for place, is_moe in enumerate(self.model.moe_blocks())
            if is_moe
        )
        self.held["other"] += absent_moe * (8 * self.config.model.moe.n_experts + 12)
        return [*earlier, last]

    def needs(self, trace: _Trace) -> Needs:
        on_host = frozenset[str]()
        if self.config.parallel.cpu_offload and self.device != "cpu":
            on_host = frozenset((PARAMETERS, GRADIENTS, MOMENTS))
        *earlier, last = trace
        if not self.differ:
            return needs_of(self.held, last, self.traced.layers, self.passes, on_host)
        times = (1, self.passes - 2)
        return needs_of(
            self.held, last, self.traced.layers, 1, on_host, list(zip(earlier, times, strict=False))
        )

    def _batch(self) -> Batch:
        """Sequences of several documents, one of them nearly as long as the sequence."""
        n, length = self.config.train.micro_batch, self.config.data.seq_len
        tokens = np.ones(length + 1, np.int64)
        tokens[1] = 0
        return sequence_batch(sequences_of(tokens, length, eot=0), np.zeros(n, np.int64))

    def _states(self) -> Mapping[Tensor, list[Tensor]]:
        states = self.optimizer.state.items()
        return {parameter: list(state.values()) for parameter, state in states}

    def _few_chunks(self) -> AbstractContextManager[None]:
        """Limit the number of chunks of the loss, which are small on a CPU."""
        n_tokens = self.config.train.micro_batch * self.config.data.seq_len
        logits = n_tokens * self.config.model.vocab_size // self.parallel_dims.tp
        least = cross_entropy._CHUNK_ELEMENTS["cpu"]
        return patch.dict(cross_entropy._CHUNK_ELEMENTS, cpu=max(least, -(-logits // _MOST_CHUNKS)))

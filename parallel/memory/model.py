"""A model as `parallel.apply` creates it for one rank, prepared for a trace of its step: weights
without data, and hooks that set the category of allocated memory and mark where layers begin.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from configs.parallel_dims import ParallelDims
from configs.schema import JobConfig
from models.attention import GroupedQueryAttention, LatentAttention, layer_of
from models.decoder import Decoder
from models.documents import DocumentAttention
from models.moe import Experts, FeedForward, MoE
from parallel import mesh as meshes
from parallel.apply import parallelize
from parallel.dispatch.gathering import routed_dispatchers
from parallel.dispatch.hierarchical import Hierarchical
from parallel.fsdp.fp8_weights import Fp8Weights, fsdp_groups, gather_in_fp8
from parallel.memory.attention import fused_attention
from parallel.memory.layers import reduced
from parallel.memory.timeline import BACKWARD, END, FORWARD, HEAD, REFRESH, STEP, Bytes
from parallel.memory.tracker import MemoryTracker, Segment, storage_of
from parallel.shards import local_of

PARAMETERS, GRADIENTS, MOMENTS = "parameters", "gradients", "AdamW moments"
GATHERED, REDUCTION, FP8_SHARDS = "gathered weights", "gradient reduction", "shards in FP8"
BATCH, MASKS, RUNNING, NORM = "batch", "attention masks", "running backward", "gradient norm"
ENDS, RESIDUAL, LOSS = "embedding and last norm", "residual stream", "logits and loss"
"""Categories of memory other than those of modules."""
MODULES: dict[type[nn.Module], str] = {
    GroupedQueryAttention: "attention",
    LatentAttention: "attention",
    MoE: "routing and dispatch",
    Experts: "experts",
    FeedForward: "dense feed-forward",
}
ROUTED = ("routing and dispatch", "experts")
"""Categories that depend on the choice of experts."""
CATEGORIES = (
    PARAMETERS, GRADIENTS, MOMENTS, FP8_SHARDS, GATHERED, REDUCTION, BATCH, MASKS, ENDS, RESIDUAL,
    "attention", *ROUTED, "dense feed-forward", LOSS, RUNNING, NORM, "other",
)  # fmt: skip
"""All categories, in the order of a report."""


class TracedModel:
    """One rank's part of a model with the fewest layers that determine all; within `fake_group`."""

    def __init__(
        self, config: JobConfig, parallel_dims: ParallelDims, device: str, compute: torch.dtype
    ) -> None:
        """device: `cpu` or `cuda`. compute: dtype of forward and backward."""
        self.config, self.layers = reduced(config)
        self.tracker, self.device = MemoryTracker(device), device
        # FSDP2 queries a CUDA device, which need not exist
        mesh = replace(meshes.build(parallel_dims, "cpu"), device_type=device)
        with torch.device("meta"):
            self.module = Decoder(self.config.model, self.layers.trunk)
        parallelize(self.module, mesh, self.config, compute)
        self.blocks = self.module.blocks()
        self._name_axes(mesh)
        self._watch_modules()
        for group in fsdp_groups(self.module):
            self._watch_group(group)
        with self.tracing():
            self.fp8_weights = self._materialise()

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Context in which new tensors are traced, and in which FSDP2 and the fused optimizer
        accept them although their device is unknown."""
        known = "torch.optim.optimizer._get_fused_kernels_supported_devices"
        with ExitStack() as stack:
            for check in ("_validate_no_meta_params", "_validate_cpu_offload_params"):
                stack.enter_context(patch.object(FSDPParamGroup, check))
            stack.enter_context(patch(known, lambda: ["cpu", "meta"]))
            stack.enter_context(self.tracker)
            if self.device != "cpu":
                stack.enter_context(fused_attention())
            yield

    def _materialise(self) -> list[Fp8Weights]:
        """Allocate weights, shards in FP8 (by layer), and the tensors that FSDP2 creates before its
        first step."""
        with self.category(PARAMETERS):
            self.module.to_empty(device=self.tracker.device)
            self.module.train()
        with self.category(FP8_SHARDS):
            fp8_weights = [gather_in_fp8(block, self.config.parallel) for block in self.blocks]
        # FSDP2 pads uneven shards again if it does not detect that they are the same storage
        with patch.object(FSDPParam, "reset_sharded_param", lambda _: None):
            assert isinstance(self.module, FSDPModule)
            self.module._get_fsdp_state()._lazy_init()
        for block, weights in zip(self.blocks, fp8_weights, strict=True):
            # once: the memory that FSDP2 allocates for modules is freed at the first use
            weights.refresh()
            sharded = [m for m in block.modules() if weights.weights and isinstance(m, FSDPModule)]
            for module in sharded:
                module.unshard()
            for weight in weights.weights:
                weight()
            for module in sharded:
                module.reshard()
        return fp8_weights

    def refresh(self) -> None:
        """Quantize the weights of all layers again, one layer after another."""
        for index, weights in enumerate(self.fp8_weights):
            self.tracker.mark(REFRESH, index)
            weights.refresh()

    def give_gradients(self) -> None:
        """Allocate gradients of all parameters, as after an earlier microbatch."""
        with self.category(GRADIENTS):
            for parameter in self.module.parameters():
                parameter.grad = torch.zeros_like(parameter)

    def held(self, states: Mapping[Tensor, Iterable[Tensor]]) -> Bytes:
        """Memory that all layers of the model hold now.

        states: the optimizer's tensors of each parameter.
        """
        for index, block in enumerate(self.blocks):
            found = [*block.parameters(), *block.buffers()]
            found += [p.grad for p in block.parameters() if p.grad is not None]
            found += [tensor for p in block.parameters() for tensor in states.get(p, ())]
            for weight in self.fp8_weights[index].weights:
                found += [weight.wire, weight.scales, weight.block_R]
                # memory that stays gathered between microbatches; without elements otherwise
                found += [weight.whole.data, weight.whole.transposed] if weight.whole else []
            for tensor in found:
                storage_of(local_of(tensor)).layer = index
        held: Bytes = Counter()
        for storage in self.tracker.storages.values():
            times = 1 if storage.layer is None else self.layers.times[storage.layer]
            held[storage.category] += times * storage.n_bytes
        return held

    def next_microbatch(self) -> list[Segment]:
        """Begin the trace of a further microbatch of the step; returns that of the previous one."""
        trace = self.tracker.begin(STEP)
        self._now(ENDS)
        return trace

    def trace(self, core: DocumentAttention, step: Callable[[], object]) -> list[Segment]:
        """The trace of one step, or of its last microbatch (`next_microbatch`) and the rest of it.
        core: of its microbatches, which has no masks yet."""
        self.tracker.begin(STEP)
        with self.category(MASKS):
            for index in self.layers.kept:
                core.prepare(layer_of(self.config.model, min(index, self.layers.n_trunk - 1)))
        self._now(ENDS)
        step()
        return self.tracker.begin("")

    def enter(self, category: str) -> None:
        """Set the category of the next allocations."""
        self.tracker.categories.append(category)

    def leave(self) -> None:
        """Restore the previous category."""
        self.tracker.categories.pop()

    @contextmanager
    def category(self, name: str) -> Iterator[None]:
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def _name_axes(self, mesh: meshes.Mesh) -> None:
        groups: list[tuple[str, Any]] = []  # meshes have separate groups for the same axis
        for view in (mesh.dense, mesh.whole, mesh.expert):
            groups += [(axis, view[axis].get_group()) for axis in view.mesh_dim_names or ()]
        for _, dispatcher in routed_dispatchers(self.module):
            if isinstance(dispatcher.planner, Hierarchical):
                groups += [("ep between nodes", dispatcher.planner.across.group)]
                groups += [("ep in a node", dispatcher.planner.within.group)]
        self.tracker.axes = {g.group_name: axis for axis, g in groups if g.size() > 1}

    def _watch_modules(self) -> None:
        """Set the category of each part's allocations, and mark where layers begin."""
        model = self.module
        kinds: dict[nn.Module, str] = {model.embed: ENDS, model.norm: ENDS}
        kinds.update((block, RESIDUAL) for block in self.blocks)
        for module in model.modules():
            for kind, name in MODULES.items():
                if isinstance(module, kind):
                    kinds[module] = name
        for module, name in kinds.items():
            module.register_forward_pre_hook(lambda *_, name=name: self.enter(name))
            module.register_forward_hook(lambda *_: self.leave(), always_call=True)
        # before the hooks of FSDP2, which are part of the layer
        for index, block in enumerate(self.blocks):
            block.register_forward_pre_hook(self._marking(FORWARD, index), prepend=True)
            block.register_forward_hook(self._marking_backward(BACKWARD, index), prepend=True)
        model.norm.register_forward_pre_hook(self._marking(HEAD), prepend=True)
        model.norm.register_forward_hook(lambda *_: self._now(LOSS))
        model.embed.register_forward_hook(self._marking_backward(END), prepend=True)
        model.register_forward_hook(lambda *hooked: self._watch_losses(hooked[2]))

    def _marking(self, name: str, layer: int | None = None) -> Callable[..., None]:
        return lambda *_: self.tracker.mark(name, layer)

    def _marking_backward(self, name: str, layer: int | None = None) -> Callable[..., None]:
        """A forward hook that marks when the gradient of the output is computed."""

        def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
            is_first = name != END or self.tracker.segments[-1].mark[0] == STEP
            if output.requires_grad and is_first:  # MTP modules read embeddings, too
                output.register_hook(self._marking(name, layer))

        return hook

    def _watch_losses(self, losses: Any) -> None:
        for loss in losses if isinstance(losses, tuple) else (losses,):
            loss.register_hook(lambda _: self._now(RUNNING))

    def _now(self, category: str) -> None:
        """Set the category of allocations outside all that have their own."""
        self.tracker.categories[0] = category

    def _watch_group(self, group: Any) -> None:
        """Set the category of FSDP2's allocations for a group of parameters."""
        is_root = group is fsdp_groups(self.module)[0]
        reduce = self._within(REDUCTION, group.post_backward)

        def post_backward(*arguments: Any) -> None:
            reduce(*arguments)
            for record in group.fsdp_params:
                kept = [record.sharded_param.grad, record.unsharded_accumulated_grad]
                if hasattr(record, "_unsharded_param"):  # where nothing is converted to fp32
                    kept.append(record._unsharded_param.grad)
                for grad in kept:
                    if grad is not None:
                        storage_of(local_of(grad)).recategorize(GRADIENTS)
            if is_root:
                self._now(NORM)

        group.post_backward = post_backward
        for name in ("unshard", "wait_for_unshard"):
            setattr(group, name, self._within(GATHERED, getattr(group, name)))

    def _within(self, category: str, run: Callable[..., None]) -> Callable[..., None]:
        def named(*arguments: Any, **options: Any) -> None:
            with self.category(category):
                run(*arguments, **options)

        return named

"""Activation recomputation: a block keeps its input and is run again in backward.

| `parallel.recompute` | kept of a block beside its input | run again |
|---|---|---|
| none | everything backward needs | nothing |
| full | the expert choice | all of it, up to the last tensor that backward needs |
| selective | the expert choice and the results of the operations in `recompute_keep` | the rest |

The expert choice is never computed twice: a recomputation that rounds differently (another kernel,
another order of a sum) could choose other experts, and the rows would no longer match what forward
sent. Each recomputed pass therefore carries a tape: forward records the choice of the block's
router, recomputation reads it, and counts nothing (`models.router.Router.tape`).

Non-reentrant checkpointing of torch, with its selective policy (arXiv:2205.05198, section 5).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import kernels.gemm.gemm_fp8
import kernels.grouped_gemm.grouped_gemm
import kernels.grouped_gemm.grouped_gemm_fp8  # noqa: F401  (all three for the operations that they define)
from configs.schema import ParallelConfig
from models.decoder import Decoder
from models.moe import Experts
from models.router import Router, Tape, routers

_aten, _c10d, _phalanx = torch.ops.aten, torch.ops._c10d_functional, torch.ops.phalanx
KEEP: dict[str, tuple[Any, ...]] = {
    "attention": (
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
    ),
    "matmul": (
        _aten.mm.default,
        _aten.addmm.default,
        _phalanx.grouped_gemm_nt.default,
        _phalanx.grouped_gemm_fp8_nt.default,
        _phalanx.gemm_fp8.default,
    ),
    "exchange": (
        _c10d.all_gather_into_tensor.default,
        _c10d.reduce_scatter_tensor.default,
        _c10d.all_to_all_single.default,
    ),
}
"""The operations behind each name of `parallel.recompute_keep`."""
# FSDP2's hooks within a block label what they do for the profiler, in backward more than in
# forward; torch's selective policy refuses an operation that forward did not have
SAC_IGNORED_OPS.update(
    (
        torch.ops.profiler._record_function_enter_new.default,
        torch.ops.profiler._record_function_exit._RecordFunction,
    )
)


def apply_recompute(model: Decoder, config: ParallelConfig) -> None:
    """Wrap the forward of every `recompute_every`-th block; names of parameters do not change."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.recompute_h = config.recompute_swiglu
    if config.recompute == "none":
        return
    kept = config.recompute_keep if config.recompute == "selective" else ()
    operations = [operation for name in kept for operation in KEEP[name]]
    for block in dict.fromkeys(model.blocks()[:: config.recompute_every]):  # each once
        block.forward = _Recomputed(block, operations)  # type: ignore[method-assign, assignment]


class _Recomputed:
    """A block's forward that is run again in backward."""

    def __init__(self, block: nn.Module, operations: list[Any]) -> None:
        self.block, self.forward, self.operations = block, block.forward, operations
        self.routers = routers(block)

    def __call__(self, *arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*arguments)
        return checkpoint(
            self.forward,
            *arguments,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing in a block is random
            context_fn=self._contexts,
        )

    def _contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        tapes = [Tape() for _ in self.routers]
        first, again = _with_tapes(self.routers, tapes), _with_tapes(self.routers, tapes)
        if not self.operations:
            return first, again
        keep = set(self.operations)

        def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            if operation in keep:
                return CheckpointPolicy.MUST_SAVE
            return CheckpointPolicy.PREFER_RECOMPUTE

        selective = create_selective_checkpoint_contexts(policy)
        again = _both(again, _gathered(self.block))
        return _both(first, selective[0]), _both(again, selective[1])


@contextmanager
def _with_tapes(found: list[Router], tapes: list[Tape]) -> Iterator[None]:
    """Hand the tapes to the routers; they record on the first pass and replay on the second."""
    for router, tape in zip(found, tapes, strict=True):
        router.tape = tape
    try:
        yield
    finally:
        for router in found:
            router.tape = None


@contextmanager
def _gathered(block: nn.Module) -> Iterator[None]:
    """With all weights of a block gathered. Forward mostly finds them gathered ahead; gathering
    them in recomputation would be another operation that forward did not have."""
    for module in block.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    yield


@contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(outer)
        stack.enter_context(inner)
        yield

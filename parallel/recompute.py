"""Activation recomputation: a block keeps its input and is run again in backward.

| `parallel.recompute` | kept of a block in addition to its input | run again |
|---|---|---|
| none | everything backward needs | nothing |
| full | the expert choice | all of it, up to the last tensor that backward needs |
| selective | the expert choice and the results of the operations in `recompute_keep` | the rest |

The expert choice is never computed twice: a recomputation that rounds differently (another kernel,
another order of a sum) could choose other experts, and the rows would no longer match those that
forward sent. Both passes are called with the same `models.step_context.LayerContext`: the first
stores the router's decision there, recomputation reads it and counts nothing.

Non-reentrant checkpointing of torch, with its selective policy (arXiv:2205.05198, section 5).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import kernels.gemm.gemm_fp8
import kernels.grouped_gemm.grouped_gemm
import kernels.grouped_gemm.grouped_gemm_fp8  # noqa: F401  (all three define operators)
from configs.schema import ParallelConfig
from models.block import Block
from models.decoder import Decoder
from models.moe import Experts

_aten, _c10d, _phalanx = torch.ops.aten, torch.ops._c10d_functional, torch.ops.phalanx
KEEP: dict[str, tuple[Any, ...]] = {
    "attention": (
        _aten._flash_attention_forward.default,
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
"""The operations of each name in `parallel.recompute_keep`."""
# FSDP2's hooks within a block label their work for the profiler, with more labels in backward than
# in forward; torch's selective policy raises for an operation that forward did not have
SAC_IGNORED_OPS.update(
    (
        torch.ops.profiler._record_function_enter_new.default,
        torch.ops.profiler._record_function_exit._RecordFunction,
    )
)


def apply_recompute(model: Decoder, config: ParallelConfig) -> None:
    """Run every `recompute_every`-th block again in backward; names of parameters do not change."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.recompute_h = config.recompute_swiglu
    if config.recompute == "none":
        return
    kept = config.recompute_keep if config.recompute == "selective" else ()
    operations = frozenset(operation for name in kept for operation in KEEP[name])
    for block in model.blocks()[:: config.recompute_every]:
        block.runner = RecomputeRunner(block, operations)


class RecomputeRunner:
    """Runs a block's computation again in backward (`models.block.Block.runner`)."""

    def __init__(self, block: Block, operations: frozenset[Any]) -> None:
        """operations: forward keeps their results."""
        # torch.compile reads the contexts of a checkpoint from constants only
        options: dict[str, Any] = {"use_reentrant": False}
        options["preserve_rng_state"] = False  # no random operations in a block
        if operations:
            options["context_fn"] = partial(_contexts, block, operations)
        self.checkpoint: Callable[..., Any] = partial(checkpoint, **options)

    def __call__(self, compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return compute(*arguments)
        output: Tensor = self.checkpoint(compute, *arguments)
        return output


def _contexts(
    block: Block, operations: frozenset[Any]
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of forward and of its recomputation, which reads the results that the first kept."""
    first, again = create_selective_checkpoint_contexts(partial(_policy, operations))
    return first, _gathered(block, again)


def _policy(
    operations: frozenset[Any], context: Any, operation: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    keep = operation in operations
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _gathered(block: Block, inner: AbstractContextManager[Any]) -> Iterator[None]:
    """Run `inner` with all weights of the block gathered. In forward they usually are already;
    gathering them in recomputation would be another operation that forward did not have."""
    for module in block.modules():
        if isinstance(module, FSDPModule):  # it is sharded after its runner was created
            module.unshard()
    with inner:
        yield

"""The sync-free path on 64 ranks without data: tensors that have shapes and no values.

Reading a value of such a tensor, in Python or inside an operation, raises an error. So nothing in
forward and backward depends on data: neither a split, nor a shape, nor a branch. (The guard of
`dispatch_special.py` computes real values, but on a CPU it only checks calls through
torch's dispatcher and the methods of Tensor.)
"""

from collections.abc import Iterator
from typing import Literal
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

import models.moe
from configs.dispatch import DispatchConfig
from configs.model import MoEConfig
from models.moe import Experts
from parallel.dispatch.factory import dispatcher_maker
from tests.parallel.dispatch.dispatch_special import device_gemm
from tests.step_contexts import layer_context

RANKS, TOKENS, WIDTH, TOP_K = 64, 24, 64, 4


@pytest.fixture
def ranks() -> Iterator[dist.ProcessGroup]:
    """A fake group of 64 ranks, of which only this rank exists."""
    dist.init_process_group("fake", rank=3, world_size=RANKS, store=FakeStore())
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def forward_and_backward(
    group: dist.ProcessGroup, options: DispatchConfig, in_step: bool = True
) -> None:
    # bf16, as `torch._grouped_mm` requires on a device
    with FakeTensorMode(), patch.object(models.moe, "grouped_gemm_nt", device_gemm):
        dispatcher = dispatcher_maker(2 * RANKS, group, options)()
        torch.set_default_dtype(torch.bfloat16)
        try:
            experts = Experts(WIDTH, MoEConfig(n_experts=2, top_k=1, d_expert=32, expert_bias=True))
        finally:
            torch.set_default_dtype(torch.float32)
        x = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        weights, ids = torch.rand(TOKENS, 2 * RANKS).topk(TOP_K, 1)
        context = layer_context(2 * RANKS) if in_step else None
        y = dispatcher.run(x, ids, weights.requires_grad_(), experts, lambda: x * 2, context)
        y.backward(torch.randn_like(y))
        assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize(
    "options",
    [
        DispatchConfig(kind="sync_free"),
        DispatchConfig(kind="sync_free", chunks=3, capacity_factor=0.7),
        DispatchConfig(kind="sync_free", dispatch_dtype="fp8", combine_grad_dtype="fp8"),
    ],
    ids=["plain", "chunks", "fp8"],
)
def test_nothing_depends_on_data(ranks: dist.ProcessGroup, options: DispatchConfig) -> None:
    forward_and_backward(ranks, options)


@pytest.mark.parametrize(("kind", "in_step"), [("all_to_all", True), ("sync_free", False)])
def test_the_exact_path_does(
    ranks: dist.ProcessGroup, kind: Literal["all_to_all", "sync_free"], in_step: bool
) -> None:
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        forward_and_backward(ranks, DispatchConfig(kind=kind), in_step)

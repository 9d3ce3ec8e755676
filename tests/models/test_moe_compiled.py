"""A whole MoE layer under `torch.compile` without a graph break: run on a CPU, traced for CUDA."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from configs.model import AttentionConfig, ModelConfig, MoEConfig
from configs.precision import FP8Config
from kernels.gemm.linear_fp8 import Fp8Weight
from models.decoder import Decoder
from models.fp8 import apply_fp8
from models.init import initialize
from models.layers.linear import Fp8Linear, Linear, project
from models.moe import MoE
from tests.step_contexts import layer_context, totals_of

MODEL = ModelConfig(
    vocab_size=8, d_model=64, n_layers=1, init_std=0.2,
    attention=AttentionConfig(n_heads=1, head_dim=64),
    moe=MoEConfig(n_experts=8, top_k=2, d_expert=32, n_shared_experts=1, n_groups=4, top_groups=2,
            score_func="sigmoid"),
)  # fmt: skip


def layer(fp8: bool) -> MoE:
    model = Decoder(MODEL)
    initialize(model, MODEL, seed=0)
    if fp8:
        apply_fp8(model, FP8Config())
    (block,) = model.blocks()
    assert isinstance(block.ffn, MoE)
    return block.ffn


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("fp8", "sizes"),
    [(False, (40, 7)), (True, (40,)), pytest.param(True, (40, 7), marks=pytest.mark.slow)],
)
def test_equals_eager(fp8: bool, sizes: tuple[int, ...]) -> None:
    """Output, gradients and the counts of choices. For a second number of tokens a graph for any
    number is traced, which takes longest in FP8."""
    moe = layer(fp8)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    for tokens in sizes:
        x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        grad = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1))
        results = []
        for run in (moe, compiled):
            context = layer_context(MODEL.moe.n_experts)
            y = run(x, context)
            gradients = torch.autograd.grad(y, (x, *moe.parameters()), grad)
            results.append([y, *gradients, totals_of(context).counts_E])
        assert results[0][-1].sum() == tokens * MODEL.moe.top_k
        for ours, eager in zip(*results, strict=True):
            assert torch.equal(ours, eager)


def test_traces_for_cuda() -> None:
    """No operation reads data. (A build of torch without CUDA cannot trace gradients for it, nor
    slices, which FP8 needs; the kernels of both are compiled offline.)"""
    found: list[str] = []

    def look(graph: fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        found.extend(str(node.target) for node in graph.graph.nodes if node.op != "placeholder")
        run: Callable[..., Any] = graph.forward
        return run

    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = Decoder(MODEL)
        (block,) = model.blocks()
        with FakeTensorMode(), torch.no_grad():
            for module in block.ffn.modules():
                for held in cast(list[dict[str, Any]], [module._parameters, module._buffers]):
                    for name, tensor in held.items():
                        if tensor is not None:
                            held[name] = torch.empty(
                                tensor.shape, dtype=tensor.dtype, device="cuda"
                            )
            x = torch.empty(40, 64, device="cuda")
            y = torch.compile(block.ffn, fullgraph=True, backend=look)(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert y.shape == (40, 64) and y.device.type == "cuda"
    ours = {name for name in found if "phalanx" in name}
    wanted = {"route", "permutation", "gather_rows", "combine_rows", "grouped_gemm_nt", "swiglu"}
    assert all(any(f"phalanx.{name}" in node for node in ours) for name in wanted), found


def test_projections_of_gathered_weights() -> None:
    """A weight gathered by FSDP2 has no transposed copy; its data is used instead, once."""
    torch.manual_seed(0)
    layers = [Fp8Linear.of(Linear(32, width, bias=False), False) for width in (16, 24)]
    for each in layers:
        given = Fp8Weight.of(each.weight)
        gathered = given.data, given.data, given.scales
        each.sources["weight"] = partial(Fp8Weight, *gathered)
    x = torch.randn(9, 32, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return torch.cat(project(x, *layers), 1)

    eager, compiled = run(x), torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(eager, compiled)
    leaves = [x, *(each.weight for each in layers)]
    ours, theirs = (torch.autograd.grad(y.square().sum(), leaves) for y in (compiled, eager))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

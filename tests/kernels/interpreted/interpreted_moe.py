"""Interpreter tests: a whole MoE layer with Triton kernels against the layer without them."""

import pytest
import torch
from torch import Tensor

from configs.model import AttentionConfig, ModelConfig, MoEConfig
from configs.precision import FP8Config
from kernels.grouped_gemm.grouped_gemm_fp8 import row_alignment
from kernels.mlp.swiglu import Activation
from models.decoder import Decoder
from models.fp8 import apply_fp8
from models.init import initialize
from models.moe import LocalDispatcher, MoE
from tests.kernels.interpreted.lane import kernels_on_cpu, relative
from tests.step_contexts import layer_context, totals_of


def layer(activation: Activation, n_experts: int, top_k: int, fp8: bool) -> MoE:
    moe = MoEConfig(
        n_experts=n_experts, top_k=top_k, d_expert=40, n_shared_experts=1, activation=activation,
        score_func="sigmoid",
    )  # fmt: skip
    attention = AttentionConfig(n_heads=1, head_dim=16)
    config = ModelConfig(
        vocab_size=4, d_model=48, n_layers=1, init_std=0.2, attention=attention, moe=moe
    )  # fmt: skip
    model = Decoder(config)
    initialize(model, config, seed=1)
    if fp8:
        apply_fp8(model, FP8Config())
    (block,) = model.blocks()
    assert isinstance(block.ffn, MoE)
    return block.ffn


def results(moe: MoE, x: Tensor, grad: Tensor) -> list[Tensor]:
    leaf, context = x.clone().requires_grad_(), layer_context(moe.router.config.n_experts)
    y = moe(leaf, context)
    gradients = torch.autograd.grad(y, (leaf, *moe.parameters()), grad)
    return [y.detach(), *gradients, totals_of(context).counts_E.float()]


SIZES: dict[Activation, tuple[int, int, int]] = {"swiglu": (3, 2, 11), "clamped_swiglu": (9, 4, 2)}
"""Experts, choices per token, tokens."""


@pytest.mark.parametrize(
    ("activation", "fp8"),
    [
        ("swiglu", True),
        ("clamped_swiglu", False),
        # the activations in FP8 and not: interpreted_swiglu.py
        pytest.param("swiglu", False, marks=pytest.mark.slow),
        pytest.param("clamped_swiglu", True, marks=pytest.mark.slow),
    ],
)
def test_layer(activation: Activation, fp8: bool) -> None:
    """In fp32, so that our kernels compute every product: router, permutation, gather, grouped
    products, activation, combine, and all their gradients, including experts without rows."""
    n_experts, top_k, tokens = SIZES[activation]
    moe = layer(activation, n_experts, top_k, fp8)
    x, grad = torch.randn(tokens, 48), torch.randn(tokens, 48)
    expected = results(moe, x, grad)
    if fp8:
        moe.dispatcher = LocalDispatcher(n_experts, row_alignment("cuda"))
    with kernels_on_cpu():
        ours = results(moe, x, grad)
    names = ["y", "x", *(name for name, _ in moe.named_parameters()), "counts"]
    assert torch.equal(ours[-1], expected[-1])
    for name, a, b in zip(names, ours, expected, strict=True):
        # in FP8 a rounding of an intermediate may differ
        assert relative(a, b) < (2e-3 if fp8 else 1e-5), name

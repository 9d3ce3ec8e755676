"""Our operations as torch operations: `torch.library.opcheck`, and compiled to one graph.

They are in one file because what they import from torch takes 1.6 s in each process.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.gemm.linear_fp8 import Fp8Weight, linears_fp8
from kernels.grouped_gemm import grouped_gemm as bf16
from kernels.grouped_gemm import grouped_gemm_fp8 as fp8
from kernels.layers import cross_entropy, norm, rope
from kernels.layers.cross_entropy import FOREIGN, linear_cross_entropy
from kernels.layers.norm import rms_norm
from kernels.layers.rope import rotate
from kernels.mlp import swiglu
from kernels.mlp.swiglu import Activation
from kernels.moe import permute, router
from kernels.moe.router import RouterOptions
from kernels.quantization.quantize import (
    quantize_1x128,
    quantize_1x128_128x1_grouped,
    quantize_128x128,
)
from tests.kernels import test_cross_entropy, test_swiglu
from tests.kernels.test_grouped_gemm import Sizes, fp8_operands, groups, rows_of

check = torch.library.opcheck
slow = pytest.mark.slow
WITHOUT_GRADIENT = ("test_schema", "test_faketensor")


def assert_one_graph(
    function: Callable[..., tuple[Tensor, ...]], *leaves: Tensor, dynamic: bool | None = True
) -> None:
    """Its results, and the gradients of the first of them, have the same bits in one graph."""
    torch.compiler.reset()
    results = []
    for run in (
        function,
        torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic),
    ):
        own = [leaf.detach().clone().requires_grad_(leaf.requires_grad) for leaf in leaves]
        found, wanted = run(*own), [leaf for leaf in own if leaf.requires_grad]
        grad = torch.linspace(-1, 1, found[0].numel()).view(found[0].shape).to(found[0].dtype)
        grads = torch.autograd.grad(found[0], wanted, grad) if wanted else ()
        results.append([*found, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("tokens", [0, 7])
def test_cross_entropy_operations(tokens: int) -> None:
    x, w, targets = test_cross_entropy.operands(tokens, 20)
    leaves = (x.requires_grad_(), w.requires_grad_(), targets)
    check(cross_entropy._operation, (*leaves, 0.1, True))
    check(cross_entropy._operation, (x.detach(), w.detach(), targets, 0.0, False))
    targets[1:2] = FOREIGN
    for logsumexp, with_gradient in ((None, True), (torch.ones(tokens), False)):
        logits = torch.randn(tokens, 20).bfloat16()
        arguments = (logits, targets, logsumexp, 0.1, with_gradient)
        check(cross_entropy._token_losses_, arguments)


@pytest.mark.parametrize("needs_grad", [True, False])
def test_cross_entropy_in_one_graph(needs_grad: bool) -> None:
    x, w, targets = test_cross_entropy.operands(33, 40)

    def loss(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return (linear_cross_entropy(x, w, targets, None, 1e-3) * 2,)

    assert_one_graph(loss, x.requires_grad_(needs_grad), w.requires_grad_(needs_grad))


@pytest.mark.parametrize(
    ("activation", "rows"),
    # what is checked does not depend on the activation
    [("swiglu", 0), ("clamped_swiglu", 3), ("swiglu", 150),
     *(pytest.param(*case, marks=slow)
       for case in (("clamped_swiglu", 0), ("swiglu", 3), ("clamped_swiglu", 150)))],
)  # fmt: skip
def test_swiglu_operations(activation: Activation, rows: int) -> None:
    gate_up, weights, grad = test_swiglu.inputs(rows, 136, torch.bfloat16)
    leaves = (gate_up.requires_grad_(), weights.requires_grad_())
    for w in (leaves[1], None):
        check(swiglu._swiglu, (leaves[0], w, activation))
    plain, w = gate_up.detach(), weights.detach()
    for with_h in (True, False):
        arguments = (grad, plain, w if with_h else None, activation, with_h)
        check(swiglu._swiglu_backward, arguments, test_utils=WITHOUT_GRADIENT)
    utilities = ("test_faketensor",)  # opcheck's comparison cannot multiply FP8
    check(swiglu._swiglu_quantized, (plain, w, activation, True), test_utils=utilities)
    ends, counts = torch.tensor([rows // 2, rows]), torch.tensor([rows // 2, rows - rows // 2])
    data, scales = quantize_1x128(plain)
    for found in (
        (plain, w, activation, False, None, None, None),
        (plain, None, activation, True, ends, counts, None),
        (data, w, activation, False, ends, counts, scales),
    )[: 3 if rows else 2]:  # opcheck cannot copy an empty matrix with padded columns
        check(swiglu._swiglu_backward_quantized, (grad, *found), test_utils=utilities)


# the compiler sees the activation only as a string that it hands on
@pytest.mark.parametrize("activation", ["swiglu", pytest.param("clamped_swiglu", marks=slow)])
def test_swiglu_in_one_graph(activation: Activation) -> None:
    def forward(gate_up: Tensor, weights: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        h = swiglu.swiglu(gate_up, weights, activation)
        plain = gate_up.detach(), weights.detach(), activation
        more = swiglu.swiglu_backward_quantized(grad, *plain)
        return h, swiglu.swiglu_quantized(*plain).scales, more.h_columns.scales

    gate_up, weights, grad = test_swiglu.inputs(9, 130, torch.float32)
    assert_one_graph(forward, gate_up.requires_grad_(), weights.requires_grad_(), grad)


# one token takes the same code as five
@pytest.mark.parametrize("tokens", [0, 5, pytest.param(1, marks=slow)])
def test_router_operations(tokens: int) -> None:
    logits, bias = torch.randn(tokens, 8, requires_grad=True), torch.randn(8)
    ids = torch.randint(0, 8, (tokens, 2))
    check(router._route, (logits, bias, None, 2, True, 4, 2, True, 1.5))
    check(router._route, (logits, bias, ids, 2, False, 1, 1, False, 1.5))
    grad = torch.randn(tokens, 2)
    check(router._backward, (grad, logits.detach(), ids, True, True, 1.5))


def test_router_in_one_graph() -> None:
    torch.manual_seed(0)
    logits, bias = torch.randn(6, 8, requires_grad=True), torch.randn(8)

    def step(logits: Tensor) -> tuple[Tensor, ...]:
        ids, weights, counts = router.route(logits, bias, RouterOptions(2, True))
        return (weights * (ids + 1)).sum(), counts

    assert_one_graph(step, logits, dynamic=None)


@pytest.mark.parametrize("tokens", [0, 9, pytest.param(1, marks=slow)])
def test_permutation_operations(tokens: int) -> None:
    ids = torch.randint(0, 4, (tokens * 2,))
    order, inverse, *_ = permute._permutation(ids, 3, 1, len(ids))
    # exact sizes depend on data, which the meta device does not have
    for align, n_slots in ((1, len(ids)), (16, 64)):
        check(permute._permutation, (ids, 3, align, n_slots))
    x = torch.randn(tokens, 5, requires_grad=True)
    check(permute._gather_rows, (x, order, inverse, 2))
    rows = torch.randn(len(order), 5, requires_grad=True)
    check(permute._combine_rows, (rows, order, inverse, 2))


@pytest.mark.parametrize("align", [1, 32])
def test_permutation_in_one_graph(align: int) -> None:
    torch.manual_seed(0)
    ids, x = torch.randint(0, 5, (30, 2)), torch.randn(30, 8, requires_grad=True)

    def there_and_back(x: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        to = permute.permutation(ids, 4, align)
        return (permute.combine_rows(permute.gather_rows(x, to).square(), to, 2),)

    assert_one_graph(there_and_back, x, ids, dynamic=None)


LAYERS: dict[str, tuple[Any, Any]] = {
    "norm": (norm._rms_norm, lambda x, w, t: (x, w, 1e-5)),
    "norm without weight": (norm._rms_norm, lambda x, w, t: (x, None, 1e-5)),
    "norm, rows apart": (norm._rms_norm, lambda x, w, t: (x[..., :4], w[:4], 1e-5)),
    "rotation": (rope._rotate, lambda x, w, t: (x, *t, False, False)),
    "rotation back, interleaved": (rope._rotate, lambda x, w, t: (x, *t, True, True)),
    "rotation of a part": (
        rope._rotate, lambda x, w, t: (x[..., 2:], t[0][:, 1:], t[1][:, 1:], True, False)
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        *((name, 3) for name in LAYERS), ("norm", 0), ("rotation back, interleaved", 0),
        # without tokens, views and flags make no difference
        *(pytest.param(name, 0, marks=slow)
          for name in LAYERS if name not in ("norm", "rotation back, interleaved")),
    ],
)  # fmt: skip
def test_layer_operations(name: str, tokens: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, 2, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    operation, arguments = LAYERS[name]
    check(operation, arguments(x, weight, torch.randn(2, tokens, 4).unbind()))


@pytest.mark.parametrize("rows", [0, 3])
def test_layers_without_a_gradient(rows: int) -> None:
    x, weight = torch.randn(rows, 136).bfloat16(), torch.randn(136).bfloat16()
    for w in (weight, None):
        arguments = (x, x, w, torch.rand(rows))
        check(norm._rms_norm_backward, arguments, test_utils=WITHOUT_GRADIENT)


def test_layers_in_one_graph() -> None:
    def layer(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        y, rstd = norm._rms_norm(x, weight, 1e-5)
        assert not rstd.requires_grad
        return (rotate(rms_norm(y, weight, 1e-5), cos, sin, False),)

    torch.manual_seed(0)
    x, weight = torch.randn(5, 2, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    assert_one_graph(layer, x, weight, *torch.randn(2, 5, 4).unbind())


def grouped() -> dict[str, tuple[Any, ...]]:
    """Every operation of products and quantization with example arguments."""
    torch.manual_seed(0)
    sizes: Sizes = [(5, 3), (0, 0), (130, 0)]
    ends, counts = groups(sizes)
    x, dy = (rows_of(sizes, width, 0, torch.bfloat16) for width in (24, 16))
    w = torch.randn(3, 16, 24).bfloat16()
    fp8_of = {layout: made[0] for layout, made in fp8_operands(sizes, 16, 24, False).items()}
    dense, (square, _) = quantize_1x128(x), quantize_128x128(w[0])
    dtype = torch.bfloat16
    return {
        "grouped_gemm_nt": (*(t.clone().requires_grad_() for t in (x, w)), ends, counts, ""),
        "grouped_gemm_nn": (dy, w, ends, counts, ""),
        "grouped_gemm_tn": (dy, x, ends, counts, torch.float32, ""),
        "grouped_gemm_fp8_nt": (*fp8_of["nt"], dtype, "triton"),
        "grouped_gemm_fp8_nn": (*fp8_of["nn"], dtype, "triton"),
        "grouped_gemm_fp8_tn": (*fp8_of["tn"], dtype, 1, "triton"),
        "quantize_1x128": (x, False),
        "quantize_128x1": (x, ends, counts, True),
        "quantize_1x128_128x1": (x, None, None, False),
        "quantize_128x128": (w, False),
        "gemm_fp8": ("nt", *dense, *square, dtype, "triton"),
    }  # fmt: skip


@pytest.mark.parametrize("name", grouped())
def test_grouped_operations(name: str) -> None:
    """Schema, shapes and strides without data, gradients, and dynamic shapes."""
    arguments = grouped()[name]
    parts = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if all(x.element_size() > 1 for x in arguments if isinstance(x, Tensor)):
        parts.append("test_schema")  # torch compares operands, which fails in FP8
    check(getattr(torch.ops.phalanx, name).default, arguments, test_utils=parts)


def test_experts_in_one_graph() -> None:
    torch.manual_seed(0)
    ends, counts = groups([(5, 3), (0, 0), (9, 0)])
    x, w = torch.randn(17, 24).bfloat16(), torch.randn(3, 16, 24).bfloat16()
    dense = torch.randn(16, 24).bfloat16()

    def experts(x: Tensor, w: Tensor, dense: Tensor) -> tuple[Tensor, ...]:
        rows, columns = quantize_1x128_128x1_grouped(x.detach(), ends, counts)
        quantized, _ = quantize_128x128(w)
        y = fp8.grouped_gemm_fp8_nt(*rows, *quantized, ends, counts)
        dw = fp8.grouped_gemm_fp8_tn(*columns, *columns, ends, counts, torch.float32)
        plain = bf16.grouped_gemm_nt(x, w, ends, counts)
        (projected,) = linears_fp8(x, [dense], [Fp8Weight.of(dense)])
        return ((plain.float() + projected + y.detach() + dw.sum())[:8],)

    leaves = (leaf.requires_grad_() for leaf in (x, w, dense))
    assert_one_graph(experts, *leaves, dynamic=None)

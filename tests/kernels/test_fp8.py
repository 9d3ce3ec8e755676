"""FP8 on the CPU: accuracy per tile, hard values, the linear layer, and error messages."""

import math
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

from kernels.fp8 import Quantized, fp8_dtype
from kernels.gemm import linear_fp8 as module
from kernels.gemm.gemm_fp8 import (
    gemm_fp8_nn,
    gemm_fp8_nn_reference,
    gemm_fp8_nt,
    gemm_fp8_nt_reference,
    gemm_fp8_tn,
    gemm_fp8_tn_reference,
)
from kernels.gemm.gemm_fp8_triton import TILES, choose_tile
from kernels.gemm.linear_fp8 import Fp8Weight, linears_fp8, linears_fp8_reference
from kernels.quantization.quantize import (
    dequantize_1x128,
    dequantize_128x1,
    dequantize_128x128,
    quantize_1x128,
    quantize_1x128_128x1,
    quantize_128x1,
    quantize_128x128,
)
from scripts.gpu_suite.harness import tile_difference

FORMS: list[tuple[tuple[int, int], Callable[..., Quantized], Callable[..., Tensor]]] = [
    ((1, 128), quantize_1x128, dequantize_1x128),
    ((128, 1), quantize_128x1, dequantize_128x1),
    ((128, 128), lambda x, p=False: quantize_128x128(x, p)[0], dequantize_128x128),
]


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("form", range(3))
@pytest.mark.parametrize("shape", [(130, 150), (1, 1), (128, 128), (3, 300)], ids=str)
def test_quantize_against_plain_loops(
    shape: tuple[int, int], form: int, power_of_two: bool
) -> None:
    torch.manual_seed(0)
    (height, width), quantize, dequantise = FORMS[form]
    x = torch.randn(shape) * 2.0 ** torch.randint(-20, 20, shape)
    data, scales = quantize(x, power_of_two)
    assert data.shape == x.shape and data.dtype == torch.float8_e4m3fn
    assert scales.shape == (math.ceil(shape[0] / height), math.ceil(shape[1] / width))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
            scale = float(x[block].abs().max() / 448)
            if power_of_two:
                scale = 2.0 ** math.ceil(math.log2(scale))
            assert scales[i, j] == scale
            expected = (x[block] / torch.tensor(scale)).to(torch.float8_e4m3fn)
            assert torch.equal(data[block].float(), expected.float())
            assert torch.equal(dequantise(data, scales)[block], expected.float() * scale)


def test_quantize_of_hard_values() -> None:
    x = torch.zeros(4, 256)
    x[0, 0], x[0, 200], x[1, :2] = math.inf, 3.0, torch.tensor([math.nan, 1.0])
    x[2, :3] = torch.tensor([1e-41, -0.0, 2.0**-100])
    x[3, 128:] = 3e38
    data, scales = quantize_1x128(x)
    assert scales.isnan().tolist() == [[True, False], [True, False], [False, False], [False, False]]
    assert data.float()[:2, :128].isnan().all() and data.float()[0, 200] == 448
    assert (scales[2] == 2.0**-80).all() and (data.float()[2] == 0).all()
    assert (data.float()[3, 128:] == 448).all() and (data.float()[3, :128] == 0).all()


def test_quantize_keeps_both_memory_orders() -> None:
    x = torch.randn(33, 144)
    (data, scales), column_major = quantize_128x128(x)
    assert data.is_contiguous() and column_major.stride() == (1, 48)
    assert torch.equal(data.float(), column_major.float()) and scales.shape == (1, 2)
    assert quantize_128x1(x).data.stride() == (1, 48)
    assert quantize_1x128(x).scales.stride() == (1, 36)


Product = tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...], Tensor]


def products(a_MK: Tensor, b_NK: Tensor) -> dict[str, Product]:
    """Function, reference, operands, and the exact product of the quantized operands."""
    rows, (b, _) = quantize_1x128(a_MK), quantize_128x128(b_NK)
    turned, column_major = quantize_128x128(b_NK.T)
    columns = quantize_128x1(a_MK.T), quantize_128x1(b_NK.T)
    exact_a = dequantize_1x128(*rows).double()
    return {
        "nt": (gemm_fp8_nt, gemm_fp8_nt_reference, (*rows, *b),
               exact_a @ dequantize_128x128(*b).double().T),
        "nn": (gemm_fp8_nn, gemm_fp8_nn_reference, (*rows, column_major, turned.scales),
               exact_a @ dequantize_128x128(*turned).double()),
        "tn": (gemm_fp8_tn, gemm_fp8_tn_reference, (*columns[0], *columns[1]),
               dequantize_128x1(*columns[0]).double().T @ dequantize_128x1(*columns[1]).double()),
    }  # fmt: skip


@pytest.mark.parametrize(
    "shape", [(256, 128, 384), (130, 260, 300), (1, 1, 1), (129, 832, 576), (5, 300, 64)], ids=str
)
def test_gemm(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    M, N, K = shape
    a, b = torch.randn(M, K), torch.randn(N, K)
    for layout, (function, reference, operands, exact) in products(a, b).items():
        for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 3e-6)):
            for run in (function, reference):
                out = run(*operands, dtype)
                assert out.dtype == dtype and tile_difference(out, exact) < limit, layout
        if all(size % 128 == 0 for size in shape):
            assert tile_difference(function(*operands), a.double() @ b.double().T) < 1e-3, layout


def test_gemm_of_hard_values() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(256, 384), torch.randn(256, 384)
    a[7, 130], a[64:128], b[128:] = 1e6, a[64:128] * 1e-20, b[128:] * 1e15
    b[:, 256:] = 0
    for layout, (function, _, operands, exact) in products(a, b).items():
        assert tile_difference(function(*operands, torch.float32), exact) < 1e-6, layout
    a[3, 5] = math.nan
    expected = torch.zeros(256, 256, dtype=torch.bool)
    expected[3] = True  # also in tn, where a scale covers 128 values of one row of a
    for layout, (function, _, operands, _) in products(a, b).items():
        assert torch.equal(function(*operands).isnan(), expected), layout


@pytest.mark.parametrize("layout", ["nt", "nn", "tn"])
def test_gemm_of_nothing(layout: str) -> None:
    for M, N, K in ((0, 3, 5), (3, 0, 5), (3, 4, 0)):
        function, _, operands, _ = products(torch.randn(M, K), torch.randn(N, K))[layout]
        assert torch.equal(function(*operands, torch.float32), torch.zeros(M, N))


def test_tile_difference_sees_one_bad_tile() -> None:
    x = torch.randn(640, 640)
    y = x.clone()
    y[300:310, 300:310] *= 1.1
    assert tile_difference(x, y) > 1e-5 > tile_difference(x, x * (1 + 1e-7))
    assert math.isnan(tile_difference(x, torch.full_like(x, math.nan)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_linear(dtype: torch.dtype, power_of_two: bool) -> None:
    """Against the reference (the same quantization), and against the layer without FP8."""
    torch.manual_seed(0)
    leaves = [torch.randn(2, 65, 200).to(dtype), torch.randn(300, 200).to(dtype)]
    grad = torch.randn(2, 65, 300).to(dtype)
    results = []
    for function in (linears_fp8, linears_fp8_reference, lambda x, w, *_: [x @ w[0].T]):
        x, w = (leaf.clone().requires_grad_() for leaf in leaves)
        (y,) = function(x, [w], [Fp8Weight.of(w, power_of_two)], power_of_two)
        results.append([y.detach(), *torch.autograd.grad(y, (x, w), grad)])
    for ours, reference, unquantised in zip(*results, strict=True):
        assert ours.shape == unquantised.shape and ours.dtype == dtype
        assert relative(ours, reference) < 1e-5
        # e4m3 has 3 bits of mantissa: two operands, each with an error of 2.6 % (RMS)
        assert 0.02 < relative(ours, unquantised) < 0.045


def relative(ours: Tensor, reference: Tensor) -> float:
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


def test_linear_keeps_one_byte_per_activation() -> None:
    x, w = torch.randn(256, 512, requires_grad=True), torch.randn(128, 512, requires_grad=True)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    fp8 = [Fp8Weight.of(w)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        linears_fp8(x, [w], fp8)
    of_weight = 128 * 512 + 4 * 4
    of_x = 256 * 512 + 2 * 512 * 4
    assert sum(t.numel() * t.element_size() for t in saved) == of_weight + of_x
    saved.clear()
    with torch.no_grad(), mock.patch.object(module, "quantize_128x1") as columns:
        linears_fp8(x, [w], fp8)
    assert not columns.called


def test_layers_of_the_same_input_share_its_forms() -> None:
    """Values and gradients equal those of separate layers; x is quantized once and kept once."""
    torch.manual_seed(0)
    x = torch.randn(130, 200).requires_grad_()
    weights = [torch.randn(n, 200).requires_grad_() for n in (64, 130)]
    fp8 = [Fp8Weight.of(weight) for weight in weights]
    with mock.patch.object(module, "quantize_1x128_128x1", wraps=quantize_1x128_128x1) as calls:
        outputs = linears_fp8(x, weights, fp8)
    assert calls.call_count == 1
    expected = [linears_fp8(x, [w], [given])[0] for w, given in zip(weights, fp8, strict=True)]
    for ours, one in zip(outputs, expected, strict=True):
        assert torch.equal(ours, one)
    grads = [torch.randn_like(y) for y in outputs]
    shared = torch.autograd.grad(outputs, [x, *weights], grads)
    theirs = torch.autograd.grad(expected, [x, *weights], grads)
    assert all(torch.equal(a, b) for a, b in zip(shared, theirs, strict=True))


def test_errors_say_what_would_be_right() -> None:
    a, (b, _) = quantize_1x128(torch.randn(4, 256)), quantize_128x128(torch.randn(8, 256))
    with pytest.raises(ValueError, match=r"cannot sum over \[256\] of a and \[128\] of b"):
        gemm_fp8_nt(*a, b.data[:, :128], b.scales)
    with pytest.raises(ValueError, match=r"scales of a are \[4, 1\].*must be \[4, 2\]"):
        gemm_fp8_nt(a.data, a.scales[:, :1], *b)
    with pytest.raises(ValueError, match="must both be e4m3"):
        gemm_fp8_nt(a.data.float(), a.scales, *b)
    with pytest.raises(ValueError, match="must be bf16 or fp32"):
        gemm_fp8_nt(*a, *b, torch.float16)
    with pytest.raises(ValueError, match=r"takes a matrix in bf16, fp16 or fp32, got \[3\]"):
        quantize_1x128(torch.zeros(3))
    with pytest.raises(ValueError, match="takes bf16 or fp32, got"):
        linears_fp8(torch.zeros(2, 2).half(), [a.data], [Fp8Weight(a.data, a.data, a.scales)])


@pytest.mark.parametrize(
    ("capability", "answer"),
    [((8, 0), None), ((8, 9), torch.float8_e4m3fn), ((9, 0), torch.float8_e4m3fn)],
)
def test_devices_without_fp8_are_refused(
    capability: tuple[int, int], answer: torch.dtype | None
) -> None:
    device = torch.device("cuda:0")
    with mock.patch("torch.cuda.get_device_capability", return_value=capability):
        if answer is None:
            with pytest.raises(ValueError, match=r"8\.9 or newer; cuda:0 has 8\.0: train in bf16"):
                fp8_dtype(device)
        else:
            assert fp8_dtype(device) == answer


@pytest.mark.parametrize(
    ("arch", "answer"),
    [("gfx942:sramecc+:xnack-", torch.float8_e4m3fnuz), ("gfx950", torch.float8_e4m3fn),
     ("gfx90a", None)],
)  # fmt: skip
def test_fp8_of_amd(arch: str, answer: torch.dtype | None) -> None:
    properties = mock.Mock(gcnArchName=arch)
    with (
        mock.patch("torch.version.hip", "6.4"),
        mock.patch("torch.cuda.get_device_properties", return_value=properties),
    ):
        if answer is None:
            with pytest.raises(ValueError, match="gfx942 or newer; cuda:0 is gfx90a"):
                fp8_dtype(torch.device("cuda:0"))
        else:
            assert fp8_dtype(torch.device("cuda:0")) == answer


def test_choose_tile() -> None:
    large, small = TILES
    assert choose_tile(8192, 8192, 132) == large
    assert choose_tile(512, 4096, 132) == large  # 128 tiles: one round
    assert choose_tile(1024, 2304, 132) == small  # 144 large tiles: a second, nearly empty round
    assert choose_tile(16, 7168, 132) == small

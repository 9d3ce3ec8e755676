"""The FP8 error of one weight: the noise of its three products, and the losses of their operands.

Noise is the difference between a product as it runs (quantized operands, the kernels' own
accumulation) and the same product in fp32 of the operands before quantization: activations and
gradients in the compute dtype, the weight as its fp32 master. Signal to noise in decibels is
`10 log10(sum of squares of the fp32 product / sum of squares of the difference)`. e4m3 has 4
significant bits: rounding one operand yields 31 to 32 dB, both 28 to 29; much less means that
values were lost.

Every block's largest value is stored as the largest code, so without power-of-two scales the share
is at least 1 in 128 values; only a share far above that indicates saturation. Shares and scales of
x and dy are those of both forms together, 1x128 and 128x1.

T tokens or rows, N output width, K input width.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.fp8 import BLOCK, Quantized, fp8_dtype
from kernels.gemm.gemm_fp8 import gemm_fp8_nn, gemm_fp8_nt, gemm_fp8_tn
from kernels.gemm.linear_fp8 import Fp8Weight
from kernels.mlp.swiglu import Activation, swiglu_backward
from kernels.quantization.quantize import dequantize_128x128, quantize_1x128, quantize_1x128_128x1
from models.layers.linear import Fp8Module, as_matrices
from parallel.fsdp.fp8_weights import GatheredWeight

PRODUCTS = ("forward", "dgrad", "wgrad")
TENSORS = ("x", "w", "dy")
MOST_DB = 120.0
"""Value reported for a product without any noise."""


@dataclass(frozen=True)
class Weight:
    """One matrix in FP8 and the values it is compared with."""

    values_NK: Tensor
    """The fp32 values."""
    fp8: Fp8Weight
    unseen: float = 0.0
    """Share of the energy of the weight that was lost by quantization and that `values` lacks."""


@dataclass
class Figures:
    """Sums over the parts of one weight's products (its experts)."""

    signal: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    noise: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    values: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    flushed: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    saturated: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    scales: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def add(self, x_TK: Tensor, dy_TN: Tensor, weight: Weight, power_of_two: bool) -> None:
        """Compute the three products of `y = x @ weight.T` in FP8 and in fp32."""
        x_rows, x_columns = quantize_1x128_128x1(x_TK, power_of_two)
        dy_rows, dy_columns = quantize_1x128_128x1(dy_TN, power_of_two)
        x, dy, w, fp8 = x_TK.float(), dy_TN.float(), weight.values_NK, weight.fp8
        y = gemm_fp8_nt(*x_rows, fp8.data, fp8.scales, torch.float32)
        self._product("forward", x @ w.T, y, weight.unseen)
        dx = gemm_fp8_nn(*dy_rows, fp8.transposed, fp8.scales, torch.float32)
        self._product("dgrad", dy @ w, dx, weight.unseen)
        dw = gemm_fp8_tn(*dy_columns, *x_columns, torch.float32)
        self._product("wgrad", dy.T @ x, dw, 0.0)
        self._operand("x", x, (x_rows, x_columns))
        self._operand("dy", dy, (dy_rows, dy_columns))
        self._operand("w", w, (Quantized(fp8.data, fp8.scales),))

    def fields(self) -> dict[str, float]:
        """`forward_db`, `x_flushed`, `x_saturated`, `x_scale_low`, `x_scale_high` and so on; scales
        as their logarithms to base 2. Undefined fields are left out: the noise of a product that is
        zero, and all fields of an unused weight."""
        found = {}
        for name in PRODUCTS:
            signal, noise = self.signal[name], self.noise[name]
            if not math.isfinite(signal + noise):
                found[f"{name}_db"] = -MOST_DB  # an infinity or NaN: no signal
            elif signal > 0:
                share = max(noise / signal, 10 ** (-MOST_DB / 10))
                found[f"{name}_db"] = -10 * math.log10(share)
        for name in TENSORS:
            logs = self.log_scales(name) if self.values[name] else torch.empty(0)
            if len(logs):
                found[f"{name}_flushed"] = self.flushed[name] / self.values[name]
                found[f"{name}_saturated"] = self.saturated[name] / self.values[name]
                found[f"{name}_scale_low"] = float(logs.min())
                found[f"{name}_scale_high"] = float(logs.max())
        return found

    def log_scales(self, name: str) -> Tensor:
        """log2 of every scale of a tensor, `[n]`, on the CPU."""
        scales = torch.cat([scales.flatten() for scales in self.scales[name]])
        return scales[scales.isfinite()].log2().cpu()  # blocks with a NaN have none

    def _product(self, name: str, exact: Tensor, found: Tensor, unseen: float) -> None:
        signal = float(exact.double().square().sum())
        self.signal[name] += signal
        self.noise[name] += float((found.double() - exact).square().sum()) + unseen * signal

    def _operand(self, name: str, values: Tensor, forms: Sequence[Quantized]) -> None:
        for data, scales in forms:
            codes = data.float()
            self.values[name] += codes.numel()
            self.flushed[name] += int(((codes == 0) & (values != 0)).sum())
            largest = torch.finfo(data.dtype).max
            self.saturated[name] += int((codes.abs() == largest).sum())
            self.scales[name].append(scales)


def add_mlp(
    up: Figures, down: Figures, x_TD: Tensor, dy_TD: Tensor, factors_T: Tensor | None,
    w13: Weight, w2: Weight, activation: Activation, power_of_two: bool,
) -> None:  # fmt: skip
    """Add the products of a SwiGLU to the figures of w13 and w2, recomputing the activation.

    Args:
        up, down: Figures of w13 and w2.
        x_TD, dy_TD: Input, and gradient of the output.
        factors_T: Routing weights.
        w13, w2: The weights.
        activation: The activation function.
        power_of_two: Round scales up to powers of two.
    """
    x_rows, dy_rows = quantize_1x128(x_TD, power_of_two), quantize_1x128(dy_TD, power_of_two)
    gate_up = gemm_fp8_nt(*x_rows, w13.fp8.data, w13.fp8.scales, x_TD.dtype)
    dh = gemm_fp8_nn(*dy_rows, w2.fp8.transposed, w2.fp8.scales, x_TD.dtype)
    d_gate_up, _, h = swiglu_backward(dh, gate_up, factors_T, activation, with_h=True)
    up.add(x_TD, d_gate_up, w13, power_of_two)
    down.add(h, dy_TD, w2, power_of_two)


def weights_of(module: Fp8Module, name: str) -> Iterator[Weight]:
    """The matrices of a weight: one, or one per expert.

    If this rank does not hold the whole master, products are compared with those of the dequantized
    weight, and the noise of the weight is that of this rank's shard: errors of two operands are
    independent, so their shares of the energy add up.
    """
    fp8, source, unseen = module.fp8_weight(name), module.sources.get(name), 0.0
    if source is None:
        values = as_matrices(name, getattr(module, name)).detach()
    else:
        assert isinstance(source, GatheredWeight)
        if source.local.shape == source.shape:
            values = as_matrices(name, source.local).detach()
        else:
            values = dequantize_128x128(fp8.data, fp8.scales)
            unseen = _noise_of_shard(source)
    if values.dim() == 2:
        yield Weight(values.float(), fp8, unseen)
        return
    for e in range(len(values)):
        one = Fp8Weight(fp8.data[e], fp8.transposed[e], fp8.scales[e])
        yield Weight(values[e].float(), one, unseen)


def _noise_of_shard(source: GatheredWeight) -> float:
    """Share of the energy of this rank's piece of a weight that was lost by quantization."""
    bytes_ = source.wire
    for dim, size in enumerate(source.local.shape):
        bytes_ = bytes_.narrow(dim, 0, size)
    master_RC = source.local.detach().reshape(-1, source.local.shape[-1])
    if not master_RC.numel():
        return 0.0
    data_RC = bytes_.reshape(master_RC.shape).view(fp8_dtype(bytes_.device)).float()
    columns = torch.arange(master_RC.shape[1], device=master_RC.device) + source.first_column
    scales_RC = source.scales[source.block_R][:, columns // BLOCK]
    energy = float(master_RC.double().square().sum())
    noise = float((data_RC * scales_RC - master_RC).double().square().sum())
    return noise / energy if energy else 0.0

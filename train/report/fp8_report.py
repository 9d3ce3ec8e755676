"""Reports of the FP8 error of each layer during training (`precision.fp8.diagnose_every`).

On a reported step, an observer is attached to the modules that compute in FP8
(`models.layers.linear.Observer`). It stores a sample of the input rows of each product, and when
their gradient is available computes the fields of `train.report.fp8_figures` from the same weights,
and frees both. The computation of the step is unchanged, so its numbers are too; on other steps
there is no observer.

The sample is from the first microbatch: its first rows, up to ROWS, or of every expert its first
rows up to ROWS_OF_EXPERT. SwiGLU's intermediate values are recomputed for them. With several ranks
a report has the worst of all: the least signal to noise, the largest shares, the range of all
scales. Histograms are those of the first rank.

| field | meaning |
|---|---|
| fp8/NAME/forward_db, dgrad_db, wgrad_db | signal to noise of the three products |
| fp8/NAME/x_flushed, w_flushed, dy_flushed | share of values, not zero, that became zero |
| fp8/NAME/x_saturated, ... | share of values stored as the largest code |
| fp8/NAME/x_scale_low, x_scale_high, ... | range of the scales, log2 |

NAME is a module, or module.weight if it has two.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.precision import FP8Config
from kernels.grouped_gemm.grouped_gemm import true_rows
from kernels.mlp.mlp_fp8 import Groups
from kernels.mlp.swiglu import Activation
from models.fp8 import fp8_modules
from models.layers.linear import Fp8Linear, Fp8Module
from train.report.fp8_figures import PRODUCTS, TENSORS, Figures, add_mlp, weights_of

ROWS, ROWS_OF_EXPERT = 2048, 256
"""Rows of a sample; multiples of 128, so that its blocks are those of the step."""
NAMED = 5
"""Maximum number of printed warnings per report."""
_SMALLEST = [*(f"{name}_db" for name in PRODUCTS), *(f"{name}_scale_low" for name in TENSORS)]
_LARGEST = [f"{name}_{what}" for name in TENSORS for what in ("scale_high", "flushed", "saturated")]


@dataclass(frozen=True)
class Fp8Report:
    """One report, ready to be written."""

    fields: dict[str, float]
    histograms: dict[str, Tensor]
    """log2 of the scales."""
    lines: list[str]


@dataclass
class Fp8Diagnosis:
    """Observes the FP8 modules of a model on reported steps; every rank has one."""

    model: nn.Module
    options: FP8Config
    _found: dict[str, Figures] = field(default_factory=dict, init=False)
    _seen: set[str] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self._names = {module: name for name, module in fp8_modules(self.model).items()}
        self._weights = [
            name for module in self._names for name in _weight_names(module, self._names[module])
        ]

    def due(self, step: int) -> bool:
        """Whether a step is reported; the same on all ranks."""
        every = self.options.diagnose_every
        return every > 0 and bool(self._names) and step % every == 0

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Observe the modules in this context, if the step is reported."""
        if not self.due(step):
            yield
            return
        self._found, self._seen = {}, set()
        with ExitStack() as observed:
            for module in self._names:
                observed.enter_context(module.observed(self))
            yield

    def report(self, step: int) -> Fp8Report | None:
        """The report, None if the step is not reported; all ranks call it together."""
        if not self.due(step):
            return None
        fields = self._worst({name: found.fields() for name, found in self._found.items()})
        histograms = {
            f"fp8/{name}/{tensor}_scales": found.log_scales(tensor)
            for name, found in self._found.items()
            for tensor in TENSORS
            if len(found.log_scales(tensor))
        }
        self._found = {}
        flat = {f"fp8/{name}/{key}": v for name, own in fields.items() for key, v in own.items()}
        lines = [line for line in [summary(fields)] if line]
        lines += warnings(fields, self.options.warn_below_db)
        return Fp8Report(flat, histograms, lines)

    def linear(
        self, module: Fp8Module, name: str, x_TD: Tensor, y_TN: Tensor, groups: Groups | None
    ) -> None:
        """`models.layers.linear.Observer.linear`"""
        key = self._names[module] + ("" if isinstance(module, Fp8Linear) else f".{name}")
        if not y_TN.requires_grad or key in self._seen:
            return
        self._seen.add(key)
        x_TD = x_TD.detach().reshape(-1, x_TD.shape[-1])
        parts = _sampled(x_TD, groups)
        rows = [x_TD[part].clone() for part in parts]

        def measure(dy_TN: Tensor) -> None:
            figures = self._found.setdefault(key, Figures())
            gradients = dy_TN.reshape(-1, dy_TN.shape[-1])
            for x, part, weight in zip(rows, parts, weights_of(module, name), strict=True):
                if len(x):
                    figures.add(x, gradients[part], weight, module.power_of_two)

        _when_gradient_comes(y_TN, measure)

    def mlp(
        self, module: Fp8Module, x_RD: Tensor, y_RD: Tensor, weights_R: Tensor | None,
        groups: Groups | None, activation: Activation,
    ) -> None:  # fmt: skip
        """`models.layers.linear.Observer.mlp`"""
        key = self._names[module]
        if not y_RD.requires_grad or key in self._seen:
            return
        self._seen.add(key)
        x_RD = x_RD.detach()
        parts = _sampled(x_RD, groups)
        rows = [x_RD[part].clone() for part in parts]
        factors = [None if weights_R is None else weights_R.detach()[part] for part in parts]
        power_of_two = module.power_of_two

        def measure(dy_RD: Tensor) -> None:
            up = self._found.setdefault(f"{key}.w13", Figures())
            down = self._found.setdefault(f"{key}.w2", Figures())
            weights = zip(weights_of(module, "w13"), weights_of(module, "w2"), strict=True)
            for x, part, factor, (w13, w2) in zip(rows, parts, factors, weights, strict=True):
                if len(x):
                    dy = dy_RD[part]
                    add_mlp(up, down, x, dy, factor, w13, w2, activation, power_of_two)

        _when_gradient_comes(y_RD, measure)

    def _worst(self, own: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        """The least, or largest, of every field over all ranks."""
        signs = dict.fromkeys(_SMALLEST, 1.0) | dict.fromkeys(_LARGEST, -1.0)
        table = torch.tensor(
            [
                [
                    sign * own.get(name, {}).get(key, sign * float("inf"))
                    for key, sign in signs.items()
                ]
                for name in self._weights
            ],
            dtype=torch.float64,
        )
        if dist.is_initialized():
            dist.all_reduce(table, dist.ReduceOp.MIN)
        found = {}
        for name, row in zip(self._weights, table.tolist(), strict=True):
            pairs = zip(signs.items(), row, strict=True)
            found[name] = {key: sign * v for (key, sign), v in pairs if v != float("inf")}
        return {name: fields for name, fields in found.items() if fields}


def _weight_names(module: Fp8Module, name: str) -> list[str]:
    return [name] if isinstance(module, Fp8Linear) else [f"{name}.w13", f"{name}.w2"]


def _sampled(x_RD: Tensor, groups: Groups | None) -> list[slice]:
    """The rows of the sample, of every expert."""
    if groups is None:
        return [slice(0, min(len(x_RD), ROWS))]
    own = true_rows(groups.ends_E, groups.counts_E)
    return [slice(rows.start, min(rows.stop, rows.start + ROWS_OF_EXPERT)) for rows in own]


def _when_gradient_comes(y: Tensor, call: Callable[[Tensor], None]) -> None:
    """Hook the node that computed y, not y: by then FSDP2 has gathered the weights again."""
    index = y.output_nr

    def before(grads: tuple[Tensor | None, ...]) -> None:
        dy = grads[index]
        if dy is not None:
            with torch.no_grad():
                call(dy.detach())

    assert y.grad_fn is not None
    y.grad_fn.register_prehook(before)


def summary(fields: dict[str, dict[str, float]]) -> str:
    """One line: the median and the least signal to noise of each product."""
    parts = []
    for product in PRODUCTS:
        found = {n: own[f"{product}_db"] for n, own in fields.items() if f"{product}_db" in own}
        if found:
            least = min(found, key=lambda name: found[name])
            middle = sorted(found.values())[len(found) // 2]
            parts.append(f"{product} {middle:.1f} (least {found[least]:.1f}: {least})")
    return f"fp8, signal to noise in dB: {', '.join(parts)}" if parts else ""


def warnings(fields: dict[str, dict[str, float]], below: float) -> list[str]:
    """One line for every weight with a product of lower signal to noise than `below`, worst
    first."""
    poor: list[tuple[float, str]] = []
    for name, own in fields.items():
        low = {p: own[f"{p}_db"] for p in PRODUCTS if own.get(f"{p}_db", below) < below}
        if low:
            said = ", ".join(f"{product} {db:.1f} dB" for product, db in low.items())
            poor.append((min(low.values()), f"{name}: {said}; {_reason(own)}"))
    poor.sort()
    lines = [
        f"WARNING: {line} (precision.fp8.warn_below_db = {below:g}; precision.fp8.keep can leave "
        "it in bf16)"
        for _, line in poor[:NAMED]
    ]
    if len(poor) > NAMED:
        lines.append(f"WARNING: and {len(poor) - NAMED} more below {below:g} dB")
    return lines


def _reason(own: dict[str, float]) -> str:
    """Describes the operand that lost most values."""
    present = [tensor for tensor in TENSORS if f"{tensor}_flushed" in own]
    worst = max(present, key=lambda tensor: own[f"{tensor}_flushed"])
    low, high = own[f"{worst}_scale_low"], own[f"{worst}_scale_high"]
    return (
        f"{own[f'{worst}_flushed']:.1%} of {worst} became zero, its scales span 2^{low:.0f} to "
        f"2^{high:.0f}"
    )

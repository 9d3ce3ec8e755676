"""Projections of activations, in the compute dtype or with their products in FP8.

A module in FP8 still has its weight as a parameter: the optimizer updates it, a checkpoint stores
it and it has the gradient. The products read the quantized form, from a *source*: by default the
weight is quantized where it is used; sharded training sets a source that holds the weight gathered
in FP8, and then the parameter's values are never read.

T tokens, N output width, D input width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, Self

from torch import Tensor, nn

from kernels.gemm.linear_fp8 import Fp8Weight, linears_fp8
from kernels.mlp.mlp_fp8 import Groups
from kernels.mlp.swiglu import Activation
from models.layers.local_view import LocalViews, local_view

Source = Callable[[], Fp8Weight]


class Linear(nn.Linear, LocalViews):
    """`nn.Linear` whose parameters may be sharded."""

    weight: Any = local_view("weight")
    bias: Any = local_view("bias")


class Observer(Protocol):
    """Receives the inputs and outputs of modules in FP8 and does not change them."""

    def linear(
        self, module: "Fp8Module", name: str, x_TD: Tensor, y_TN: Tensor, groups: Groups | None
    ) -> None:
        """y is x times the transposed weight `name`."""
        ...

    def mlp(
        self, module: "Fp8Module", x_RD: Tensor, y_RD: Tensor, weights_R: Tensor | None,
        groups: Groups | None, activation: Activation,
    ) -> None:  # fmt: skip
        """y is the result of `swiglu_mlp_fp8` for x with w13 and w2."""
        ...


class Fp8Module(LocalViews):
    """Base class of modules with weights in FP8. Each is created from the module that it replaces,
    and shares its parameters."""

    def __init__(self, *arguments: Any, power_of_two: bool = False, **options: Any) -> None:
        """power_of_two: round the scales of weights and activations up to powers of two."""
        super().__init__(*arguments, **options)
        self.power_of_two = power_of_two
        self.sources: dict[str, Source] = {}
        """Sources of quantized weights, by name of the parameter."""
        self.observer: Observer | None = None

    def share_parameters(self, module: nn.Module) -> Self:
        """Use the parameters of `module`, which must not be sharded yet, and its mode."""
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        return self.train(module.training)

    @contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """Context in which `observer` receives inputs and outputs."""
        self.observer = observer
        try:
            yield
        finally:
            self.observer = None

    def read_from(self, name: str, source: Source) -> None:
        """Read the quantized weight `name` from `source` from now on."""
        self.sources[name] = source

    def fp8_weight(self, name: str) -> Fp8Weight:
        """The quantized weight, a matrix or one per expert."""
        source = self.sources.get(name)
        if source is not None:
            return source()
        return Fp8Weight.of(as_matrices(name, getattr(self, name)), self.power_of_two)


def as_matrices(name: str, weight: Tensor) -> Tensor:
    """The shape of a weight in products: gate and up of w13, `[2, F, D]` or `[E, 2, F, D]`, become
    one dimension."""
    return weight.flatten(-3, -2) if name == "w13" else weight


class Fp8Linear(Fp8Module, Linear):
    """A projection whose three products run in FP8; the bias is added in x's dtype."""

    @staticmethod
    def of(linear: Linear, power_of_two: bool) -> "Fp8Linear":
        """The FP8 form of `linear`."""
        shape, bias = (linear.in_features, linear.out_features), linear.bias is not None
        made = Fp8Linear(*shape, bias=bias, power_of_two=power_of_two, device="meta")
        return made.share_parameters(linear)

    def forward(self, x_TD: Tensor, product_TN: Tensor | None = None) -> Tensor:
        """product_TN: the product, if `project` has already computed it."""
        if product_TN is None:
            fp8_weights, power_of_two = [self.fp8_weight("weight")], self.power_of_two
            (product_TN,) = linears_fp8(x_TD, [self.weight], fp8_weights, power_of_two)
        if self.observer is not None:
            self.observer.linear(self, "weight", x_TD, product_TN, None)
        return product_TN if self.bias is None else product_TN + self.bias


def project(x_TD: Tensor, *layers: Linear) -> tuple[Tensor, ...]:
    """Every layer applied to the same x; in FP8, x is quantized and kept once for all.

    Each layer is still called: FSDP2 frees weights when every module of a group has run, and would
    otherwise keep them until the end of the forward pass.
    """
    fp8 = [layer for layer in layers if isinstance(layer, Fp8Linear)]
    if len(fp8) < len(layers):
        return tuple(layer(x_TD) for layer in layers)
    outputs = linears_fp8(
        x_TD, [layer.weight for layer in fp8], [layer.fp8_weight("weight") for layer in fp8],
        fp8[0].power_of_two,
    )  # fmt: skip
    return tuple(layer(x_TD, y_TN) for layer, y_TN in zip(layers, outputs, strict=True))

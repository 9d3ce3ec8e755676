"""The recipe `fp8_blockwise` applied to a model: which modules compute in FP8, and how.

Modules: all projections of attention (MLA's compressions too), dense and shared feed-forwards and
experts; never embeddings, head, router, norms or the attention core. These are a small part of the
computation, and the choice of experts and the loss depend on their exact values (DeepSeek-V3,
arXiv:2412.19437, section 3.3.1). A module is replaced by one that computes in FP8 and has the same
parameters, under the same names, so initialization, sharding and checkpoints are unchanged.

Experts with biases (GPT-OSS) run their products one by one: the gradient of a bias is a sum of
rows that the fused form never has in one piece. SwiGLU then keeps its input in bf16.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import ConfigError
from configs.precision import FP8Config
from kernels.fp8 import Quantized, fp8_dtype
from kernels.mlp.mlp_fp8 import Groups, grouped_linear_fp8, swiglu_mlp_fp8
from models.counts import flops_per_token
from models.decoder import Decoder
from models.layers.linear import Fp8Linear, Fp8Module, Linear, as_matrices
from models.moe import Experts, FeedForward, Rows, row_values
from models.parameters import spec_of


class Fp8FeedForward(Fp8Module, FeedForward):
    """A dense SwiGLU in FP8."""

    @staticmethod
    def of(module: FeedForward, power_of_two: bool) -> "Fp8FeedForward":
        """The FP8 form of `module`."""
        with torch.device("meta"):
            made = Fp8FeedForward(module.w2.shape[0], module.width, power_of_two=power_of_two)
        return made.share_parameters(module)

    def forward(self, x_TD: Tensor) -> Tensor:
        x_TD = self.tp_comm.gather(x_TD)
        y_TD = swiglu_mlp_fp8(
            x_TD, as_matrices("w13", self.w13), self.w2,
            self.fp8_weight("w13"), self.fp8_weight("w2"), power_of_two=self.power_of_two,
        )  # fmt: skip
        if self.observer is not None:
            self.observer.mlp(self, x_TD, y_TD, None, None, "swiglu")
        return self.tp_comm.reduce_scatter(y_TD)


class Fp8Experts(Fp8Module, Experts):
    """SwiGLU experts in FP8; rows received in FP8 are not quantized again."""

    @staticmethod
    def of(module: Experts, power_of_two: bool) -> "Fp8Experts":
        """The FP8 form of `module`."""
        with torch.device("meta"):
            made = Fp8Experts(module.w2.shape[1], module.config, power_of_two=power_of_two)
        return made.share_parameters(module)

    def forward(self, rows: Rows) -> Tensor:
        if self.b13 is not None or self.b2 is not None or self.config.weight_on == "input":
            return super().forward(rows)
        quantized, x_RD = None, rows.data
        if rows.scales is not None:
            assert rows.stand_in is not None
            quantized, x_RD = Quantized(rows.data, rows.scales), rows.stand_in
        groups, activation = _groups_of(rows), self.config.activation
        y_RD = swiglu_mlp_fp8(
            x_RD, as_matrices("w13", self.w13), self.w2,
            self.fp8_weight("w13"), self.fp8_weight("w2"), weights_R=rows.weights_R, groups=groups,
            rows=quantized, activation=activation, power_of_two=self.power_of_two,
        )  # fmt: skip
        if self.observer is not None:
            self.observer.mlp(self, row_values(rows), y_RD, rows.weights_R, groups, activation)
        return y_RD

    def product(self, x_RD: Tensor, name: str, rows: Rows) -> Tensor:
        """`x @ w.T` of every row with its expert's weight."""
        groups = _groups_of(rows)
        y_RN = grouped_linear_fp8(
            x_RD, as_matrices(name, getattr(self, name)), self.fp8_weight(name), groups,
            self.power_of_two,
        )  # fmt: skip
        if self.observer is not None:
            self.observer.linear(self, name, x_RD, y_RN, groups)
        return y_RN


def _groups_of(rows: Rows) -> Groups:
    return Groups(rows.ends_e, rows.counts_e, rows.align)


_IN_FP8: dict[type[nn.Module], Callable[[Any, bool], Fp8Module]] = {
    Linear: Fp8Linear.of, FeedForward: Fp8FeedForward.of, Experts: Fp8Experts.of,
}  # fmt: skip


def in_fp8(module: nn.Module, power_of_two: bool) -> Fp8Module | None:
    """The FP8 form of `module`, with the same parameters; None if there is none."""
    form = _IN_FP8.get(type(module))
    return None if form is None else form(module, power_of_two)


def apply_fp8(model: Decoder, options: FP8Config) -> list[str]:
    """Replace the eligible modules of a new model before any other change; returns their names.

    Raises ConfigError for a pattern that matches no module, or if no module is left.
    """
    modules, blocks = dict(model.named_modules()), _blocks(model)
    eligible = [
        (index, f"{prefix}.{name}")
        for index, (prefix, block) in enumerate(blocks)
        for name in eligible_names(block)
    ]
    check_patterns(options, list(modules), [name for _, name in eligible])
    replaced = []
    for index, name in eligible:
        if stays_in_bf16(options, index, len(blocks), name):
            continue
        module = modules[name]
        model.set_submodule(name, _IN_FP8[type(module)](module, options.power_of_two))
        replaced.append(name)
    if not replaced:
        raise ConfigError(
            "precision.recipe = 'fp8_blockwise', but precision.fp8 leaves every module in bf16"
        )
    return replaced


def eligible_names(block: nn.Module) -> list[str]:
    """The modules of a block that the recipe can replace."""
    return [name for name, module in block.named_modules() if type(module) in _IN_FP8]


def stays_in_bf16(options: FP8Config, index: int, n_blocks: int, name: str) -> bool:
    """Whether a module of that name in block `index` of `n_blocks` is left in bf16."""
    is_inside = options.first_bf16 <= index < n_blocks - options.last_bf16
    return not is_inside or any(_within(name, pattern) for pattern in options.keep)


def check_patterns(options: FP8Config, names: Sequence[str], eligible: Sequence[str]) -> None:
    """Raise ConfigError for a pattern that matches none of the modules called `names`.

    eligible: modules that the recipe can replace, for an example.
    """
    for pattern in options.keep:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"precision.fp8.keep: no module is called {pattern!r}; names are such as "
                f"{eligible[0] if eligible else names[-1]}"
            )


def check_device(device: torch.device, name: str) -> None:
    """Raise ConfigError on a device without FP8, with the name of the first layer that needs it."""
    try:
        fp8_dtype(device)
    except ValueError as error:
        raise ConfigError(f"precision.recipe = 'fp8_blockwise': {name}: {error}") from None


def _within(name: str, pattern: str) -> bool:
    """Whether a pattern matches a module or one that contains it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:n]), pattern) for n in range(1, len(parts) + 1))


def fp8_weights(model: nn.Module) -> dict[str, tuple[Fp8Module, str]]:
    """The weights of FP8 products: by name, the module and the name within it."""
    return {
        f"{name}.{key}": (module, key)
        for name, module in fp8_modules(model).items()
        for key, _ in module.named_parameters(recurse=False)
        if spec_of(f"{name}.{key}").fp8
    }


def fp8_modules(model: nn.Module) -> dict[str, Fp8Module]:
    """The modules that compute in FP8, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Fp8Module)}


@dataclass(frozen=True)
class GemmShares:
    """FLOPs of training per token of full sequences, forward and backward."""

    fp8: float
    """In products of FP8."""
    eligible: float
    """In products that the recipe can run in FP8: those of all modules that `apply_fp8`
    replaces."""
    every: float
    """In all matrix products: head, router and the attention core too."""

    def __str__(self) -> str:
        return (
            f"FP8 takes {self.fp8 / self.eligible:.1%} of the FLOPs of projections and experts, "
            f"{self.fp8 / self.every:.1%} of those of all matrix products"
        )


def gemm_shares(model: Decoder, seq_len: int) -> GemmShares:
    """The share of a model's FLOPs in FP8, from the shapes of its weights."""
    share = model.config.moe.top_k / model.config.moe.n_experts
    fp8 = eligible = 0.0
    for name, parameter in model.named_parameters():
        spec = spec_of(name)
        if spec.fp8:
            flops = 6 * parameter.numel() * (1.0 if spec.ep is None else share)
            eligible += flops
            owner = model.get_submodule(name.rpartition(".")[0])
            fp8 += flops if isinstance(owner, Fp8Module) else 0.0
    return GemmShares(fp8, eligible, flops_per_token(model.config, seq_len))


def _blocks(model: Decoder) -> list[tuple[str, nn.Module]]:
    blocks = [(f"layers.{i}", block) for i, block in enumerate(model.layers)]
    return [*blocks, *((f"mtp.{i}", block) for i, block in enumerate(model.mtp))]

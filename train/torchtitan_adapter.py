"""The only module that touches torchtitan; it is imported where it is needed.

Used of torchtitan 0.3.0: its optimizer container (regular-expression parameter groups, optimizer
state keyed by parameter name, so that checkpoints know nothing of group order), its garbage
collection at fixed steps, and its table of peak FLOP/s.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from configs.schema import OptimizerConfig
from train.bf16_moments import Bf16MomentsAdamW

if TYPE_CHECKING:
    from torchtitan.components.optimizer import OptimizersContainer

_NO_DECAY = re.compile(r"(norm|router)\.weight$|\.bias$|\.b13$|\.b2$|\.sinks$")
"""Names of parameters without weight decay."""


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, moments: Literal["fp32", "bf16"] = "fp32"
) -> "OptimizersContainer[Any]":
    """AdamW over the parameters of a parallelised model. moments: dtype they are stored in."""
    from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

    class Bf16Moments(OptimizersContainer[Any]):
        """Torchtitan has bf16 moments on CUDA only, and takes optimizers by name."""

        @staticmethod
        def _resolve_optimizer_factory(name: str) -> Callable[..., torch.optim.Optimizer]:
            return Bf16MomentsAdamW

    common = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    # the fused update wants one mesh per group
    members: dict[tuple[Any, bool], list[str]] = {}
    for name, parameter in model.named_parameters():
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        members.setdefault((mesh, _NO_DECAY.search(name) is None), []).append(name)
    groups = [
        ParamGroupConfig(
            pattern=f"^({'|'.join(map(re.escape, names))})$",
            optimizer_name="AdamW",
            optimizer_kwargs=common | {"weight_decay": config.weight_decay if decays else 0.0},
        )
        for (_, decays), names in members.items()
    ]
    kind = Bf16Moments if moments == "bf16" else OptimizersContainer[Any]
    options = OptimizersContainer.Config(param_groups=groups, implementation="fused")
    return kind(options, model_parts=[model])


def set_learning_rate(optimizer: "OptimizersContainer[Any]", lr: float) -> None:
    """Use `lr` in all groups from the next step on."""
    for inner in optimizer:
        for group in inner.param_groups:
            group["lr"] = lr


def optimizer_tensors(optimizer: "OptimizersContainer[Any]") -> dict[str, Tensor]:
    """The live state tensors by name (`state.<parameter>.exp_avg`, ...); created if need be."""
    state = optimizer.state_dict()
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def collect_garbage_every(steps: int) -> Any:
    """An object whose `run(step)` collects garbage at the same steps on all ranks."""
    from torchtitan.tools.utils import GarbageCollection

    return GarbageCollection(gc_freq=steps)


def peak_flops(device: torch.device) -> float | None:
    """Peak dense bf16 FLOP/s of a CUDA device; None for a CPU."""
    if device.type != "cuda":
        return None
    from torchtitan.tools.utils import get_peak_flops

    return float(get_peak_flops(torch.cuda.get_device_name(device)))

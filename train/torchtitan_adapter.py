"""The only module that touches torchtitan; it is imported where it is needed.

Used of torchtitan 0.3.0: its optimizer container (regular-expression parameter groups, optimizer
state keyed by parameter name, so that checkpoints know nothing of group order), its garbage
collection at fixed steps, and its table of peak FLOP/s.
"""

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from configs.schema import Optimizer

if TYPE_CHECKING:
    from torchtitan.components.optimizer import OptimizersContainer

_GROUPS = (
    (r"\.experts\.b", False),  # experts have groups of their own: they may live on another mesh
    (r"\.experts\.", True),
    (r"(norm|router)\.weight$|\.bias$|\.sinks$", False),
    (r".*", True),
)
"""(pattern of parameter names, weight decay); the first match wins."""


def build_optimizer(model: nn.Module, config: Optimizer) -> "OptimizersContainer[Any]":
    """AdamW over the parameters of a parallelised model."""
    from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

    common = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    names = [name for name, _ in model.named_parameters()]
    groups = []
    for pattern, decays in _GROUPS:
        taken = [name for name in names if re.search(pattern, name)]
        names = [name for name in names if name not in taken]
        if taken:
            decay = config.weight_decay if decays else 0.0
            kwargs = common | {"weight_decay": decay}
            groups.append(
                ParamGroupConfig(pattern=pattern, optimizer_name="AdamW", optimizer_kwargs=kwargs)
            )
    container: OptimizersContainer[Any] = OptimizersContainer.Config(
        param_groups=groups, implementation="fused"
    ).build(model_parts=[model])
    return container


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

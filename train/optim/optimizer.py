"""AdamW over the parameters of a parallelized model, with weight decay groups and state by name.

It is torch's fused update, with one group per mesh (a call supports only one mesh) and per weight
decay. State has the name of its parameter (`state.<parameter>.exp_avg`), so a checkpoint depends
neither on the order of parameters nor on their groups. The names are those of torchtitan's
optimizer container.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from configs.schema import OptimizerConfig
from models.parameters import spec_of
from train.optim.bf16_moments import Bf16MomentsAdamW, initial_state


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, moments: Literal["fp32", "bf16"] = "fp32"
) -> torch.optim.AdamW:
    """AdamW with a group per mesh and weight decay. moments: the dtype in which they are stored."""
    members: dict[tuple[Any, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        members.setdefault((mesh, spec_of(name).decay), []).append((name, parameter))
    groups = [
        {"params": named, "weight_decay": config.weight_decay if decays else 0.0}
        for (_, decays), named in members.items()
    ]
    kind = Bf16MomentsAdamW if moments == "bf16" else torch.optim.AdamW
    betas = config.beta1, config.beta2
    return kind(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.AdamW, lr: float) -> None:
    """Use `lr` in all groups from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_tensors(optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """The live state tensors by name (`state.<parameter>.exp_avg`, `.exp_avg_sq`, `.step`).

    A parameter that no step has updated yet gets its initial state: zeros.
    """
    dtype = torch.bfloat16 if isinstance(optimizer, Bf16MomentsAdamW) else torch.float32
    tensors: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            state = optimizer.state[parameter]
            if not state:
                state.update(initial_state(parameter, dtype))
            tensors |= {f"state.{name}.{key}": tensor for key, tensor in state.items()}
    return tensors

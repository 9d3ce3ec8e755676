"""AdamW over the parameters of a parallelized model, with weight decay groups and state by name.

It is torch's fused update of this rank's parts of the parameters, with one group per weight decay.
State has the name of its parameter (`state.<parameter>.exp_avg`), so a checkpoint depends
neither on the order of parameters nor on their groups. The names are those of torchtitan's
optimizer container.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from configs.schema import OptimizerConfig
from models.parameters import spec_of
from parallel.shards import local_of
from train.optim.bf16_moments import Bf16MomentsAdamW
from train.optim.fused_update import MOMENTS, fused_update, initial_state


class ShardedAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`, fused, of each rank's part of DTensors."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            updated = [p for p in group["params"] if p.grad is not None]
            states = [self.state[parameter] for parameter in updated]
            for parameter, state in zip(updated, states, strict=True):
                if not state:
                    state.update(initial_state(parameter, torch.float32))
            moments = [[local_of(state[name]) for name in MOMENTS] for state in states]
            fused_update(updated, moments, [state["step"] for state in states], group)


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, moments: Literal["fp32", "bf16"] = "fp32"
) -> torch.optim.AdamW:
    """AdamW with a group per weight decay. moments: the dtype in which they are stored."""
    members: dict[bool, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        members.setdefault(spec_of(name).decay, []).append((name, parameter))
    groups = [
        {"params": named, "weight_decay": config.weight_decay if decays else 0.0}
        for decays, named in members.items()
    ]
    kind = Bf16MomentsAdamW if moments == "bf16" else ShardedAdamW
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

"""The oracle of all dispatchers: tokens and choices in plain loops, all experts in one place.

FP8 wires are part of it: `fp8` names the exchanges that round. Everything is differentiable, so
gradients come from autograd through the loops.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.model import MoEConfig
from kernels.quantization.quantize import dequantize_1x128, quantize_1x128
from models.moe import Experts


def rounded(x: Tensor) -> Tensor:
    """A row as FP8 with 1x128 scales carries it."""
    data, scales = quantize_1x128(x.float()[None])
    return dequantize_1x128(data, scales)[0].to(x.dtype)


class Carried(torch.autograd.Function):
    """A row on the wire: rounded on the way and, its gradient, on the way back, where wanted."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: bool, back: bool) -> Tensor:
        ctx.back = back
        return rounded(x) if there else x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return rounded(grad) if ctx.back else grad, None, None


@dataclass(frozen=True)
class Fp8:
    """Which exchanges round."""

    dispatch: bool = False
    combine: bool = False
    combine_grad: bool = False
    dispatch_grad: bool = False


def expert_output(experts: Experts, e: int, x: Tensor, weight: Tensor) -> Tensor:
    """One token's weighted output of one expert."""
    config: MoEConfig = experts.config
    if config.weight_on == "input":
        x, weight = x * weight, torch.ones_like(weight)
    gate, up = experts.w13[e, 0] @ x, experts.w13[e, 1] @ x
    if experts.b13 is not None:
        gate, up = gate + experts.b13[e, 0], up + experts.b13[e, 1]
    if config.activation == "clamped_swiglu":
        gate, up = gate.clamp(max=7), up.clamp(-7, 7)
        hidden = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    else:
        hidden = F.silu(gate) * up
    y = experts.w2[e] @ hidden
    if experts.b2 is not None:
        y = y + experts.b2[e]
    return weight * y


def reference_dispatch(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    experts: Experts,
    fp8: Fp8,
    experts_per_node: int = 0,
) -> Tensor:
    """What every dispatcher has to give for these tokens; `experts` holds all of them.

    A token travels once per choice; with `experts_per_node` once per node, and what its experts
    there made of it returns as one sum.
    """
    outputs = []
    for t in range(len(x_TD)):
        travels: dict[int, list[int]] = {}
        for k, e in enumerate(ids_TK[t].tolist()):
            travels.setdefault(e // experts_per_node if experts_per_node else k, []).append(k)
        y = torch.zeros_like(x_TD[t])
        for choices in travels.values():
            x = Carried.apply(x_TD[t], fp8.dispatch, fp8.dispatch_grad)
            back = torch.zeros_like(y)
            for k in choices:
                back = back + expert_output(experts, int(ids_TK[t, k]), x, weights_TK[t, k])
            y = y + Carried.apply(back, fp8.combine, fp8.combine_grad)
        outputs.append(y)
    return torch.stack(outputs) if outputs else x_TD * 1

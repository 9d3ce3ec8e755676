"""Reference for all dispatchers: plain loops over tokens and choices, with all experts on one rank.

It includes rows sent in FP8: `fp8` selects the exchanges that round. Everything is differentiable,
so autograd computes gradients through the loops.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.model import MoEConfig
from kernels.quantization.quantize import dequantize_1x128, quantize_1x128
from models.moe import Experts


def rounded(x_RD: Tensor) -> Tensor:
    """Rows rounded to FP8 with 1x128 scales, each row separately."""
    return dequantize_1x128(*quantize_1x128(x_RD.float())).to(x_RD.dtype)


class Carried(torch.autograd.Function):
    """Rows on the wire, rounded in forward, and their gradients in backward, if requested."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, there: bool, back: bool) -> Tensor:
        ctx.back = back
        return rounded(x_RD) if there else x_RD.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return rounded(grad) if ctx.back else grad, None, None


@dataclass(frozen=True)
class Fp8:
    """Exchanges that round."""

    dispatch: bool = False
    combine: bool = False
    combine_grad: bool = False
    dispatch_grad: bool = False


Weights = dict[str, Tensor]


def weights_of(experts: Experts) -> list[Weights]:
    """The weights of every expert; unbound once, because a gradient of each would be as large as
    all of them."""
    apart = {name: parameter.unbind() for name, parameter in experts.named_parameters()}
    return [{name: of[e] for name, of in apart.items()} for e in range(experts.config.n_experts)]


def expert_output(config: MoEConfig, expert: Weights, x: Tensor, weight: Tensor) -> Tensor:
    """One token's weighted output of one expert."""
    if config.weight_on == "input":
        x, weight = x * weight, torch.ones_like(weight)
    gate, up = (half @ x for half in expert["w13"].unbind())
    if "b13" in expert:
        gate, up = gate + expert["b13"][0], up + expert["b13"][1]
    if config.activation == "clamped_swiglu":
        gate, up = gate.clamp(max=7), up.clamp(-7, 7)
        hidden = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    else:
        hidden = F.silu(gate) * up
    y = expert["w2"] @ hidden
    if "b2" in expert:
        y = y + expert["b2"]
    return weight * y


def reference_dispatch(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    experts: Experts,
    fp8: Fp8,
    experts_per_node: int = 0,
) -> Tensor:
    """Expected result of every dispatcher for these tokens; `experts` contains all of them.

    A token is sent once per choice; with `experts_per_node` once per node, and the outputs of its
    experts there return as one sum.
    """
    travels: list[tuple[int, list[int]]] = []  # a token, and its choices that are sent together
    for t, ids in enumerate(ids_TK.tolist()):
        together: dict[int, list[int]] = {}
        for k, e in enumerate(ids):
            together.setdefault(e // experts_per_node if experts_per_node else k, []).append(k)
        travels += [(t, choices) for choices in together.values()]
    if not travels:
        return x_TD * 1
    tokens_R = torch.tensor([t for t, _ in travels])
    rows = Carried.apply(x_TD[tokens_R], fp8.dispatch, fp8.dispatch_grad).unbind()
    parts, weights, backs = weights_of(experts), [w.unbind() for w in weights_TK.unbind()], []
    for x, (t, choices) in zip(rows, travels, strict=True):
        back = torch.zeros_like(x)
        for k in choices:
            expert = parts[int(ids_TK[t, k])]
            back = back + expert_output(experts.config, expert, x, weights[t][k])
        backs.append(back)
    carried = Carried.apply(torch.stack(backs), fp8.combine, fp8.combine_grad)
    return torch.zeros_like(x_TD).index_add(0, tokens_R, carried)

"""Causal attention within documents on CUDA: all documents of all sequences in one launch.

Documents of different lengths are consecutive rows, and their first rows are an argument of the
kernel, so time and memory are those of the documents: there is no mask `[B, L, L]`. The kernels are
those of FlashAttention-2 (arXiv:2307.08691) in torch, which also know grouped heads and windows.

A sink is a learned logit per head that the softmax includes and that has no value (GPT-OSS;
arXiv:2309.17453). The kernels know none, but return the logsumexp of every row: with
`lse' = log(exp(lse) + exp(sink))` the output is multiplied by exp(lse - lse'). Backward computes
probabilities as exp(score - lse), and their gradient from the product of the output and its
gradient, so given `lse'` and the new output it returns the gradients with sinks. The gradient of a
sink is -sum(exp(sink - lse') * <output, its gradient>).

The kernels have one width for queries, keys and values, a multiple of 8: narrower ones are padded
with zeros (MLA's values, 128 wide, for keys of 192).

Shapes: T tokens, H query heads, G key/value heads, C head width, V value width, N documents.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_WIDEST = 256
_MULTIPLE = 8
_ATEN = torch.ops.aten


def supports(q_THC: Tensor, v_width: int) -> bool:
    """Whether the kernels run for such queries: bf16 or fp16, an NVIDIA GPU from sm_80 on, and no
    head wider than 256. Tensors without data (`meta`) are those of such a GPU."""
    if q_THC.dtype not in (torch.bfloat16, torch.float16):
        return False
    if max(q_THC.shape[-1], v_width) > _WIDEST or torch.version.hip is not None:
        return False
    if q_THC.device.type == "meta":
        return True
    return q_THC.is_cuda and torch.cuda.get_device_capability(q_THC.device) >= (8, 0)


def varlen_attention(
    q_THC: Tensor,
    k_TGC: Tensor,
    v_TGV: Tensor,
    starts_N1: Tensor,
    longest: int,
    scale: float,
    sinks_H: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    """`o_THV`. Differentiable in q, k, v and the sinks.

    Args:
        q_THC, k_TGC, v_TGV: Queries, keys and values, for which `supports` is true.
        starts_N1: int32 `[N + 1]`, on the device: first tokens of the documents, then T.
        longest: Length of the longest document.
        scale: Factor on the logits.
        sinks_H: Logits, or None.
        window: Number of keys up to its own that a query attends to; 0: all of its document.
    """
    value_width = v_TGV.shape[-1]
    width = max(q_THC.shape[-1], value_width)
    width += -width % _MULTIPLE
    q, k, v = (
        F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x
        for x in (q_THC, k_TGC, v_TGV)
    )
    out: Tensor = _Varlen.apply(q, k, v, sinks_H, starts_N1, longest, scale, window)
    return out[..., :value_width]


class _Varlen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor | None, starts: Tensor,
        longest: int, scale: float, window: int,
    ) -> Tensor:  # fmt: skip
        limits = _limits(scale, window)
        out, lse_HT, state, unused, _ = _ATEN._flash_attention_forward(
            q, k, v, starts, starts, longest, longest, 0.0, True, False, **limits
        )
        if sinks_H is not None:
            with_sinks = torch.logaddexp(lse_HT, sinks_H.to(lse_HT.dtype)[:, None])
            out = out * (lse_HT - with_sinks).exp_().T[..., None].to(out.dtype)
            lse_HT = with_sinks
        ctx.save_for_backward(q, k, v, out, lse_HT, sinks_H, starts, state, unused)
        ctx.longest, ctx.limits = longest, limits
        return out

    @staticmethod
    def backward(ctx: Any, grad_THC: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse_HT, sinks_H, starts, state, unused = ctx.saved_tensors
        grad_q, grad_k, grad_v = _ATEN._flash_attention_backward(
            grad_THC.contiguous(), q, k, v, out, lse_HT, starts, starts, ctx.longest, ctx.longest,
            0.0, True, state, unused, **ctx.limits,
        )  # fmt: skip
        grad_sinks = None
        if sinks_H is not None:
            delta_HT = (grad_THC.to(lse_HT.dtype) * out).sum(-1).T
            sunk_HT = (sinks_H.to(lse_HT.dtype)[:, None] - lse_HT).exp_()
            grad_sinks = -(sunk_HT * delta_HT).sum(1).to(sinks_H.dtype)
        return grad_q, grad_k, grad_v, grad_sinks, None, None, None, None


def _limits(scale: float, window: int) -> dict[str, Any]:
    """The kernels' window is the number of keys before a query's own."""
    if not window:
        return {"scale": scale}
    return {"scale": scale, "window_size_left": window - 1, "window_size_right": 0}

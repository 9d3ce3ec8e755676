"""Output projection and cross-entropy in one, without ever holding all logits.

For T tokens and a vocabulary of V the logits are the largest tensor of a training step (16 GiB for
32 k tokens and 128 k words in fp32). Here a chunk of tokens at a time goes through the head; its
loss, and in training its gradients for the hidden states and the head, are made at once, and the
chunk's logits are dropped. The products run in the operands' dtype, log-sum-exp and softmax in
fp32, the head's gradient is accumulated in fp32.

Idea: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv:2411.09009;
gradients made in the forward pass as in Liger Kernel, arXiv:2410.10989. Ranks may divide the
vocabulary (arXiv:1909.08053, section 3): per chunk they share the maximum and the sum of
exponentials of each token, 8 bytes.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

IGNORE = -1
"""Target of a token that has no loss."""
FOREIGN = -2
"""Target that another rank of a divided vocabulary holds; its loss is counted there."""
_CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**28}
"""Logits per chunk. CPU: 4 MiB in fp32 stay in cache (22 ms against 36 ms with four times as many,
for 1024 tokens of width 256 and 4096 words). CUDA: 1 GiB in fp32 fills the device."""


def linear_cross_entropy(
    x_TD: Tensor,
    weight_vD: Tensor,
    targets_T: Tensor,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Sum of `-log softmax(x @ weight.T)[target]` over tokens, an fp32 scalar.

    targets_T: int64 in [0, V), or IGNORE. Differentiable in x and weight.
    group: ranks that divide the vocabulary evenly, in order; each gives the same tokens and its
    rows of the weight, and gets the loss of the tokens whose targets are among its words. The sum
    over ranks of these losses, and of the gradients for x, is that of the whole.
    """
    wants_grad = torch.is_grad_enabled()  # within forward it always is off
    if group is not None:
        targets_T = _local_targets(targets_T, weight_vD.shape[0], group)
    return _LinearCrossEntropy.apply(x_TD, weight_vD, targets_T, wants_grad, group)


def _local_targets(targets_T: Tensor, width: int, group: dist.ProcessGroup) -> Tensor:
    """Targets counted from this rank's first word; FOREIGN where another rank holds them."""
    local_T = targets_T - group.rank() * width
    local_T = local_T.where((local_T >= 0) & (local_T < width), FOREIGN)
    return local_T.where(targets_T != IGNORE, IGNORE)


def linear_cross_entropy_reference(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Plain-torch form of `linear_cross_entropy`."""
    logits_TV = F.linear(x_TD, weight_VD).float()
    return F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORE, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_vD: Tensor,
        targets_T: Tensor,
        wants_grad: bool,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        needs_grad = wants_grad and any(ctx.needs_input_grad)
        loss = torch.zeros((), dtype=torch.float32, device=x_TD.device)
        grad_x = torch.empty_like(x_TD) if needs_grad else None
        grad_w = torch.zeros_like(weight_vD, dtype=torch.float32) if needs_grad else None
        chunk = max(
            _CHUNK_ELEMENTS["cpu" if x_TD.device.type == "cpu" else "cuda"] // weight_vD.shape[0], 1
        )
        for start in range(0, x_TD.shape[0], chunk):
            rows = slice(start, start + chunk)
            probs_tv, loss_t = _softmax_and_loss(x_TD[rows], weight_vD, targets_T[rows], group)
            loss += loss_t
            if grad_x is not None and grad_w is not None:
                grad_logits = _grad_logits(probs_tv, targets_T[rows]).to(x_TD.dtype)
                torch.mm(grad_logits, weight_vD, out=grad_x[rows])
                grad_w += grad_logits.T @ x_TD[rows]
        if grad_w is not None:
            ctx.save_for_backward(grad_x, grad_w)
            ctx.weight_dtype = weight_vD.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_x, grad_w = ctx.saved_tensors
        # a 0-dimensional fp32 factor multiplies in fp32 and rounds once, whatever the dtype
        return grad_x * grad, (grad_w * grad).to(ctx.weight_dtype), None, None, None


def _softmax_and_loss(
    x_tD: Tensor, weight_vD: Tensor, targets_t: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    logits_tv = F.linear(x_tD, weight_vD).float()
    picked_t = logits_tv.gather(1, targets_t.clamp(min=0)[:, None])[:, 0]
    normaliser_t = _logsumexp(logits_tv, group)
    loss = torch.where(targets_t >= 0, normaliser_t - picked_t, 0.0).sum()
    return logits_tv.sub_(normaliser_t[:, None]).exp_(), loss


def _logsumexp(logits_tv: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is None:
        return logits_tv.logsumexp(1)
    largest_t = logits_tv.amax(1)
    dist.all_reduce(largest_t, dist.ReduceOp.MAX, group)
    sum_t = (logits_tv - largest_t[:, None]).exp_().sum(1)
    dist.all_reduce(sum_t, group=group)
    return largest_t + sum_t.log()


def _grad_logits(probs_tv: Tensor, targets_t: Tensor) -> Tensor:
    mine = (targets_t >= 0).to(probs_tv.dtype)[:, None]
    probs_tv.scatter_add_(1, targets_t.clamp(min=0)[:, None], -mine)
    return probs_tv.mul_((targets_t != IGNORE)[:, None])

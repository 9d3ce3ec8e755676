"""Output projection and cross-entropy in one operation that never stores all logits.

For T tokens and a vocabulary of V the logits are the largest tensor of a training step (16 GiB for
32 k tokens and a vocabulary of 128 k in fp32). Here one chunk of tokens at a time is projected; its
loss, and in training its gradients for the hidden states and the head, are computed at once, and
the chunk's logits are freed. The products run in the operands' dtype, log-sum-exp and softmax in
fp32, and the head's gradient is accumulated in fp32. On a GPU the gradient overwrites the logits:
per token one pass for maximum and sum together, one that writes (Milakov and Gimelshein,
arXiv:1805.02867).

The z-loss keeps log-sum-exp, which cross-entropy does not constrain, near 0: `coef * logsumexp^2`
per token (PaLM, arXiv:2204.02311, section 5, with coef 1e-4). It contributes only its gradient, so
that the value is the cross-entropy and stays comparable between runs.

Idea: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv:2411.09009;
gradients computed in the forward pass as in Liger Kernel, arXiv:2410.10989. Ranks may divide the
vocabulary (arXiv:1909.08053, section 3): per chunk they exchange the maximum and the sum of
exponentials of each token, 8 bytes.

Shapes: T tokens, t of a chunk, D width, V vocabulary, v of this rank.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kernels import device

IGNORE = -1
"""Target of a token that has no loss."""
FOREIGN = -2
"""Target in another rank's part of a divided vocabulary; its loss is counted there."""
_CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**28}
"""Logits per chunk. CPU: 4 MiB in fp32 stay in cache (22 ms against 36 ms with four times as many,
for 1024 tokens of width 256 and a vocabulary of 4096). CUDA: 512 MiB in bf16 occupy the device."""


def linear_cross_entropy(
    x_TD: Tensor,
    weight_vD: Tensor,
    targets_T: Tensor,
    group: dist.ProcessGroup | None = None,
    z_loss_coef: float = 0.0,
    losses_T: Tensor | None = None,
) -> Tensor:
    """Sum of `-log softmax(x @ weight.T)[target]` over tokens, an fp32 scalar.

    Differentiable in x and weight.

    Args:
        x_TD: Hidden states.
        weight_vD: Rows of the head that this rank holds.
        targets_T: int64 in [0, V), or IGNORE.
        group: Ranks that divide the vocabulary evenly, in order. Each passes the same tokens and
            its rows of the weight; its result is the loss of the targets in its rows. The sums over
            ranks of these losses, and of the gradients for x, are those of the whole vocabulary.
        z_loss_coef: The gradients are those of the sum plus `z_loss_coef * logsumexp^2` of every
            token that has a loss; the value does not include it.
        losses_T: fp32; is filled with the loss of each token, which has no gradient.
    """
    wants_grad = torch.is_grad_enabled()  # always off within forward
    if group is not None:
        targets_T = _local_targets(targets_T, weight_vD.shape[0], group)
    elif torch.compiler.is_compiling() and losses_T is None:
        needs_grad = wants_grad and (x_TD.requires_grad or weight_vD.requires_grad)
        loss: Tensor = _operation(x_TD, weight_vD, targets_T, z_loss_coef, needs_grad)[0]
        return loss
    # otherwise no custom operator: memory tracing cannot observe allocations inside one
    return _LinearCrossEntropy.apply(
        x_TD, weight_vD, targets_T, wants_grad, group, z_loss_coef, losses_T
    )


def _local_targets(targets_T: Tensor, width: int, group: dist.ProcessGroup) -> Tensor:
    """Targets relative to this rank's first row; FOREIGN if another rank holds them."""
    local_T = targets_T - group.rank() * width
    local_T = local_T.where((local_T >= 0) & (local_T < width), FOREIGN)
    return local_T.where(targets_T != IGNORE, IGNORE)


def linear_cross_entropy_reference(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, z_loss_coef: float = 0.0
) -> Tensor:
    """Plain-torch form of `linear_cross_entropy`."""
    logits_TV = F.linear(x_TD, weight_VD).float()
    loss = F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORE, reduction="sum")
    z_loss = z_loss_coef * (logits_TV.logsumexp(1).square() * (targets_T != IGNORE)).sum()
    return loss + (z_loss - z_loss.detach())


def token_losses_(
    logits_tv: Tensor,
    targets_t: Tensor,
    logsumexp_t: Tensor | None,
    z_loss_coef: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and loss of every token, fp32. If `with_gradient`, the gradient overwrites the
    logits, in their dtype.

    logsumexp_t: over the whole vocabulary, if the logits are only a part of it; None computes it
    here.
    """
    found: tuple[Tensor, Tensor] = _token_losses_(
        logits_tv, targets_t, logsumexp_t, z_loss_coef, with_gradient
    )
    return found


def token_losses_reference_(
    logits_tv: Tensor,
    targets_t: Tensor,
    logsumexp_t: Tensor | None,
    z_loss_coef: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Plain-torch form of `token_losses_`."""
    logits = logits_tv.float()
    here_t, index_t1 = targets_t >= 0, targets_t.clamp(min=0)[:, None]
    if logsumexp_t is None:
        largest_t = logits.amax(1)
        if with_gradient:  # in place if contiguous, which saves a pass and its memory
            log_tv = logits.contiguous()
            torch.ops.aten._log_softmax.out(log_tv, 1, False, out=log_tv)
        else:
            log_tv = logits.log_softmax(1)
        made_t = largest_t - log_tv.amax(1)  # any other logit may be minus infinity
        loss_t = torch.where(here_t, -log_tv.gather(1, index_t1)[:, 0], 0.0)
    else:
        made_t = logsumexp_t.clone()
        loss_t = torch.where(here_t, made_t - logits.gather(1, index_t1)[:, 0], 0.0)
        log_tv = logits.sub_(made_t[:, None]) if with_gradient else logits
    if with_gradient:
        probs_tv = log_tv.exp_()
        if z_loss_coef:
            probs_tv.mul_((1 + 2 * z_loss_coef * made_t)[:, None])
        probs_tv.scatter_add_(1, index_t1, -here_t.float()[:, None])
        probs_tv.mul_((targets_t != IGNORE)[:, None])
        if probs_tv is not logits_tv:
            logits_tv.copy_(probs_tv)
    return made_t, loss_t


def _loss_and_gradients(
    x_TD: Tensor,
    weight_vD: Tensor,
    targets_T: Tensor,
    group: dist.ProcessGroup | None,
    z_loss_coef: float,
    needs_grad: bool,
    losses_T: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss and, if needed, the gradients for x and weight, the latter in fp32."""
    on_cpu = x_TD.device.type == "cpu" and not device.on_accelerator(x_TD)
    loss = torch.zeros((), dtype=torch.float32, device=x_TD.device)
    grad_x = torch.empty_like(x_TD) if needs_grad else None
    grad_w = torch.zeros_like(weight_vD, dtype=torch.float32) if needs_grad else None
    chunk = max(_CHUNK_ELEMENTS["cpu" if on_cpu else "cuda"] // weight_vD.shape[0], 1)
    for start in range(0, x_TD.shape[0], chunk):
        rows = slice(start, start + chunk)
        logits_tv = F.linear(x_TD[rows], weight_vD)
        if on_cpu:
            logits_tv = logits_tv.float()  # a copy in cache costs little
        logsumexp_t = None
        if group is not None:
            local_t, _ = token_losses_(logits_tv, targets_T[rows], None, 0.0, False)
            logsumexp_t = _sum_over(group, local_t)
        _, loss_t = token_losses_(
            logits_tv, targets_T[rows], logsumexp_t, z_loss_coef, grad_x is not None
        )
        loss += loss_t.sum()
        if losses_T is not None:
            losses_T[rows] = loss_t
        if grad_x is not None and grad_w is not None:
            grad_logits = logits_tv.to(x_TD.dtype)
            torch.mm(grad_logits, weight_vD, out=grad_x[rows])
            if grad_logits.dtype == grad_w.dtype:
                grad_w.addmm_(grad_logits.T, x_TD[rows])
            else:
                grad_w += grad_logits.T @ x_TD[rows]
    return loss, grad_x, grad_w


def _sum_over(group: dist.ProcessGroup, logsumexp_t: Tensor) -> Tensor:
    """Log-sum-exp over the vocabulary of all ranks."""
    largest_t = logsumexp_t.clone()
    dist.all_reduce(largest_t, dist.ReduceOp.MAX, group)
    sum_t = (logsumexp_t - largest_t).exp_()
    dist.all_reduce(sum_t, group=group)
    return largest_t + sum_t.log()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_vD: Tensor,
        targets_T: Tensor,
        wants_grad: bool,
        group: dist.ProcessGroup | None,
        z_loss_coef: float,
        losses_T: Tensor | None,
    ) -> Tensor:
        needs_grad = wants_grad and any(ctx.needs_input_grad)
        loss, grad_x, grad_w = _loss_and_gradients(
            x_TD, weight_vD, targets_T, group, z_loss_coef, needs_grad, losses_T
        )
        if needs_grad:
            ctx.save_for_backward(grad_x, grad_w)
            ctx.weight_dtype = weight_vD.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_scaled(ctx, grad), None, None, None, None, None


def _scaled(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    grad_x, grad_w = ctx.saved_tensors
    # a 0-dimensional fp32 factor multiplies in fp32 and rounds once, for every dtype
    return grad_x * grad, (grad_w * grad).to(ctx.weight_dtype)


@torch.library.custom_op("phalanx::linear_cross_entropy", mutates_args=())
def _operation(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, z_loss_coef: float, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients for x and weight, which are empty if they are not needed."""
    loss, grad_x, grad_w = _loss_and_gradients(
        x_TD, weight_VD, targets_T, None, z_loss_coef, needs_grad
    )
    if grad_x is None or grad_w is None:
        return loss, x_TD.new_empty(0), loss.new_empty(0)
    return loss, grad_x, grad_w


@_operation.register_fake
def _(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, z_loss_coef: float, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    loss = x_TD.new_empty((), dtype=torch.float32)
    if not needs_grad:
        return loss, x_TD.new_empty(0), loss.new_empty(0)
    return loss, torch.empty_like(x_TD), torch.empty_like(weight_VD, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, grad_x, grad_w = output
    ctx.mark_non_differentiable(grad_x, grad_w)
    ctx.save_for_backward(grad_x, grad_w)
    ctx.weight_dtype = inputs[1].dtype


def _gradients(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return *_scaled(ctx, grad), None, None, None


_operation.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("phalanx::token_losses_", mutates_args=("logits_tv",))
def _token_losses_(
    logits_tv: Tensor,
    targets_t: Tensor,
    logsumexp_t: Tensor | None,
    z_loss_coef: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    arguments = (logits_tv, targets_t, logsumexp_t, z_loss_coef, with_gradient)
    if device.on_accelerator(logits_tv):
        from kernels.layers.cross_entropy_triton import token_losses_ as launch

        with device.launching_on(logits_tv):
            return launch(*arguments)
    return token_losses_reference_(*arguments)


@_token_losses_.register_fake
def _(
    logits_tv: Tensor,
    targets_t: Tensor,
    logsumexp_t: Tensor | None,
    z_loss_coef: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    n_tokens = len(logits_tv)
    return tuple(logits_tv.new_empty(n_tokens, dtype=torch.float32) for _ in range(2))  # type: ignore[return-value]

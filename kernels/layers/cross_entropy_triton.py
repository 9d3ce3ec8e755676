"""Triton form of `kernels.layers.cross_entropy.token_losses_`: a program per token.

The first pass keeps a maximum and a sum of exponentials per lane and rescales the sum when the
maximum grows; the second reads the token's logits again, from cache if they fit, and overwrites
them with their gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_LARGEST_BLOCK = 4096


def token_losses_(
    logits_tv: Tensor,
    targets_t: Tensor,
    logsumexp_t: Tensor | None,
    z_loss_coef: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """`kernels.layers.cross_entropy.token_losses_`; rows of logits must be contiguous."""
    assert logits_tv.stride(1) == 1
    n_tokens, n_words = logits_tv.shape
    made_t, loss_t = (logits_tv.new_empty(n_tokens, dtype=torch.float32) for _ in range(2))
    if n_tokens:
        block = min(_LARGEST_BLOCK, triton.next_power_of_2(n_words))
        _token_losses[(n_tokens,)](
            logits_tv, targets_t, logsumexp_t, made_t, loss_t, n_words, logits_tv.stride(0),
            z_loss_coef, WITH_GRADIENT=with_gradient, BLOCK=block, num_warps=8,
        )  # fmt: skip
    return made_t, loss_t


@triton.jit
def _token_losses(  # type: ignore[no-untyped-def]
    logits_ptr, targets_ptr, logsumexp_ptr, made_ptr, loss_ptr, n_words, stride, z_loss_coef,
    WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    logits_ptr += token * stride
    target = tl.load(targets_ptr + token)
    if logsumexp_ptr is not None:
        logsumexp = tl.load(logsumexp_ptr + token)
    else:
        largest = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, n_words, BLOCK):
            words = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + words, mask=words < n_words, other=float("-inf"))
            x = x.to(tl.float32)
            grown = tl.where(x > largest, x, largest)
            # a lane with only -inf so far: exp(-inf - -inf) is NaN
            finite = tl.where(grown == float("-inf"), 0.0, grown)
            total = total * tl.exp(largest - finite) + tl.exp(x - finite)
            largest = grown
        whole = tl.max(largest, 0)
        finite = tl.where(whole == float("-inf"), 0.0, whole)
        logsumexp = finite + tl.log(tl.sum(total * tl.exp(largest - finite), 0))
    tl.store(made_ptr + token, logsumexp)
    loss = 0.0
    if target >= 0:
        loss = logsumexp - tl.load(logits_ptr + target).to(tl.float32)
    tl.store(loss_ptr + token, loss)
    if WITH_GRADIENT:
        factor = 1 + 2 * z_loss_coef * logsumexp
        tl.debug_barrier()  # the target's logit is read before it is overwritten
        for start in range(0, n_words, BLOCK):
            words = start + tl.arange(0, BLOCK)
            inside = words < n_words
            x = tl.load(logits_ptr + words, mask=inside, other=0.0).to(tl.float32)
            grad = tl.exp(x - logsumexp) * factor - tl.where(words == target, 1.0, 0.0)
            grad = tl.where(target == -1, 0.0, grad)
            tl.store(logits_ptr + words, grad.to(logits_ptr.dtype.element_ty), mask=inside)

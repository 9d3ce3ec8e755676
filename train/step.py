"""One optimizer step: microbatches, one global loss, clipping, update.

The objective is the model's loss, plus `mtp_weight` times the mean of the MTP modules' losses, each
a mean over its own target tokens of the step, plus the z-loss of their logits and the routers'
auxiliary losses, which add their gradient themselves (`kernels.cross_entropy`, `models.balance`).
The loss that is reported is the model's cross-entropy alone.

Nothing is changed before the step is known to be good: a non-finite loss or gradient stops the run
with weights, optimizer and router biases as they were, and says which rank met it first. A step
whose rows did not all find room (dispatch into buffers of fixed size) is redone before that.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from models.balance import StepScope
from models.decoder import Decoder
from models.router import open_step, take_counts, take_losses, update_biases
from parallel.dispatch.account import Account
from parallel.dispatch.overflow import exact, overflowed
from parallel.grad_norm import global_grad_norm, scale_grads
from parallel.ranks import gather_json, sum_over_ranks
from parallel.shards import local_of
from train.batches import Batch
from train.loss import count_tokens, loss_sums


class NonFiniteError(RuntimeError):
    """A loss or gradient became infinite or NaN; the message names step, ranks and parameters."""


class Updater(Protocol):
    """What the step needs of an optimizer."""

    def step(self) -> None: ...

    def zero_grad(self) -> None: ...


@dataclass(frozen=True)
class StepResult:
    """What one step gave, the same on all ranks."""

    loss: float
    """Mean over the target tokens of the step, nats."""
    grad_norm: float
    """Global 2-norm before clipping."""
    tokens: int
    """Target tokens of the step."""
    counts_LE: Tensor
    """Routed choices per MoE layer and expert over all ranks, on the CPU; MTP modules last."""
    mtp_losses: tuple[float, ...] = ()
    """Mean over its target tokens of each MTP module's loss, nats."""
    router_losses: dict[str, float] = field(default_factory=dict)
    """The auxiliary losses in use, without their coefficients, mean over layers."""
    dispatch: dict[str, float] = field(default_factory=dict)
    """Scalars about the exchange of rows; empty where no rows travel."""


def train_step(
    model: Decoder,
    optimizer: Updater,
    batches: Iterable[Batch],
    *,
    step: int,
    rank: int,
    copies: int = 1,
    clip_norm: float,
    mtp_weight: float,
    z_loss_coef: float = 0.0,
    stop: Callable[[], bool] = lambda: False,
    updated: Callable[[], None] = lambda: None,
) -> StepResult | None:
    """Run one step on this rank's microbatches; all ranks call it together.

    copies: ranks that are given the same tokens (tensor parallelism); each counts its share of
    their loss. stop: asked before every microbatch, must answer alike on all ranks. If true the
    step is abandoned without a trace and None returned. updated: called once the weights have
    changed. Raises NonFiniteError and
    CapacityOverflow.
    """
    account = Account(model)
    microbatches = list(batches)
    depth = model.config.mtp_depth
    counts = sum_over_ranks(count_tokens(microbatches, depth)) // copies
    tokens, targets = counts[0], counts[1:]
    open_step(model, StepScope(microbatches[0].core.length, tokens, sum_over_ranks))
    weights = torch.full_like(targets, mtp_weight / max(depth, 1), dtype=torch.float32)
    weights[0] = 1.0
    totals = _forward_backward(model, microbatches, targets, weights, z_loss_coef, stop)
    redo = totals is not None and overflowed(model, step)
    if redo:
        _forget(model, optimizer)
        with exact(model):
            totals = _forward_backward(model, microbatches, targets, weights, z_loss_coef, stop)
    if totals is None:
        _forget(model, optimizer)
        return None
    parameters = list(model.parameters())
    norm = global_grad_norm(parameters, rank)
    global_losses = sum_over_ranks(totals.clone())
    if not torch.isfinite(norm + global_losses.sum().to(norm.device)):
        raise NonFiniteError(_diagnose(model, step, float(totals.sum())))
    if clip_norm:
        scale_grads(parameters, norm, clip_norm)
    counts_LE = take_counts(model, account.sum_with)
    update_biases(model, counts_LE)
    router_losses = take_losses(model, sum_over_ranks)
    optimizer.step()
    optimizer.zero_grad()
    updated()
    loss, *mtp_losses = global_losses.tolist()
    return StepResult(
        loss, float(norm), int(targets[0]), counts_LE.cpu(), tuple(mtp_losses), router_losses,
        account.fields(redo),
    )  # fmt: skip


def _forward_backward(
    model: Decoder,
    microbatches: list[Batch],
    targets: Tensor,
    weights: Tensor,
    z_loss_coef: float,
    stop: Callable[[], bool],
) -> Tensor | None:
    """This rank's losses summed over microbatches, gradients added up; None where `stop` says so.

    targets, weights: of the model's loss and of each MTP module's, in the whole step.
    """
    totals = torch.zeros_like(weights)
    for batch in microbatches:
        if stop():
            return None
        losses = loss_sums(model, batch, len(weights) - 1, z_loss_coef)
        losses = losses / targets.clamp(min=1)
        (losses * weights).sum().backward()
        totals += losses.detach()
    return totals


def _forget(model: Decoder, optimizer: Updater) -> None:
    """Drop the gradients, routing counts and losses of a step that does not count."""
    optimizer.zero_grad()
    take_counts(model, lambda counts: counts)
    take_losses(model, lambda losses: losses)


def _diagnose(model: nn.Module, step: int, local_loss: float) -> str:
    """One line that names the ranks and, for gradients, the first parameter affected."""
    bad = [
        name
        for name, p in model.named_parameters()
        if p.grad is not None and not torch.isfinite(local_of(p.grad)).all()
    ]
    finite = bool(torch.isfinite(torch.tensor(local_loss)))
    reports = gather_json({"loss": finite, "parameter": bad[0] if bad else ""})
    losses = [rank for rank, report in enumerate(reports) if not report["loss"]]
    if losses:
        what = f"the loss is not finite on rank {', '.join(map(str, losses))}"
    else:
        where = [f"{r['parameter']} on rank {i}" for i, r in enumerate(reports) if r["parameter"]]
        what = f"the gradient is not finite: {', '.join(where) or 'its norm overflows'}"
    return f"step {step}: {what}; stopped before the optimizer step"

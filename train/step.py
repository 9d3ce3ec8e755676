"""One optimizer step: microbatches, one global loss, clipping, update.

The objective is the model's loss, plus `mtp_weight` times the mean of the MTP modules' losses, each
a mean over its target tokens of the step, plus the z-loss of their logits and the routers'
auxiliary losses. The losses are computed by an argument of the model's forward (`train.loss`);
z-loss and auxiliary losses add their gradient themselves in backward
(`kernels.layers.cross_entropy`, `models.balance`). The reported loss is the model's cross-entropy
alone.

No state changes before the step is known to be valid: a weight, loss or gradient that is not
finite, or whose square is too large for fp32 (`parallel.grad_norm`), raises an error with weights,
optimizer and router biases unchanged, and the error names the rank and, if known, the parameter
(`train.health.skipped_steps` decides what follows). A
step with rows that exceeded the capacity (dispatch into buffers of fixed size) is repeated before
that.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from models.balance import mean_losses
from models.decoder import Decoder
from models.router import routers, update_biases
from models.step_context import StepContext
from parallel.dispatch.gathering import routed_dispatchers
from parallel.dispatch.overflow import overflowed
from parallel.dispatch.stats import dispatch_fields, sum_counts
from parallel.fsdp.accumulation import Accumulation
from parallel.grad_norm import (
    LARGEST,
    global_grad_norm,
    in_range,
    largest_values,
    other_replicas_in_range,
    scale_grads,
)
from parallel.ranks import gather_json, sum_over_ranks
from parallel.shards import local_of
from train.data.batches import Batch
from train.loss import count_tokens, loss_sums


class NonFiniteError(RuntimeError):
    """A number of the step is infinite, NaN or too large; the message names step, ranks and
    parameters. All ranks raise it together, with no change since the previous step."""

    def __init__(self, message: str, weights_are_good: bool, can_skip: bool = False) -> None:
        super().__init__(message)
        self.weights_are_good = weights_are_good
        """Whether the state after the previous step is worth saving; false if weights are
        invalid."""
        self.can_skip = can_skip
        """Whether all weights were in range, so that the next step may be sound."""


class Updater(Protocol):
    """The interface of an optimizer that the step uses."""

    def step(self) -> None: ...

    def zero_grad(self) -> None: ...


@dataclass(frozen=True)
class StepResult:
    """Results of one step, the same on all ranks."""

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
    """Statistics of the row exchange; empty if no rows are exchanged."""


def train_step(
    model: Decoder,
    optimizer: Updater,
    batches: Iterable[Batch],
    *,
    step: int,
    rank: int,
    tp_size: int = 1,
    clip_norm: float,
    mtp_weight: float,
    z_loss_coef: float = 0.0,
    stop: Callable[[], bool] = lambda: False,
    updated: Callable[[], None] = lambda: None,
    accumulation: Accumulation | None = None,
    phase: Callable[[str], None] = lambda name: None,
) -> StepResult | None:
    """Run one step on this rank's microbatches; all ranks call it together.

    Raises NonFiniteError and CapacityOverflow.

    Args:
        model, optimizer: This rank's part of the model, and its optimizer.
        batches: The microbatches.
        step: Its number, for errors.
        rank: Of this process.
        tp_size: Ranks with the same tokens (tensor parallelism); each counts its share of their
            loss.
        clip_norm: Largest gradient norm; 0 for no clipping.
        mtp_weight, z_loss_coef: Factors of the losses.
        stop: Called before every microbatch; must return the same on all ranks. If true the step is
            abandoned, with no change, and None returned.
        updated: Called once the weights have changed.
        accumulation: What is kept between microbatches; None for nothing.
        phase: Called with the name of each phase as it begins: forward, backward, optimizer.
    """
    microbatches = list(batches)
    depth = model.config.mtp_depth
    counts = count_tokens(microbatches, depth)
    damaged = (~in_range(largest_values(_state(model).values()))).to(counts)
    *summed, damaged_ranks = sum_over_ranks(torch.stack([*counts, damaged])).unbind()
    if damaged_ranks:
        raise _out_of_range(step, [_named("the weight", _state(model))], False, can_skip=False)
    tokens, *of_modules = (count // tp_size for count in summed)
    targets = torch.stack(of_modules)
    context = StepContext.begin(
        model.moe_blocks(), model.config.moe.n_experts, microbatches[0].core.length, tokens,
        sum_over_ranks,
    )  # fmt: skip
    weights = torch.full_like(targets, mtp_weight / max(depth, 1), dtype=torch.float32)
    weights[0] = 1.0
    objective = _Objective(targets, weights, z_loss_coef)
    with _watching(model) as hidden:
        totals = _forward_backward(
            model, microbatches, objective, context, stop, phase, accumulation
        )
        if totals is not None and overflowed(model, context, step):
            optimizer.zero_grad()
            context = context.redo_exactly()
            totals = _forward_backward(
                model, microbatches, objective, context, stop, phase, accumulation
            )
    if totals is None:
        if accumulation is not None:
            accumulation.discard()
        optimizer.zero_grad()
        return None
    phase("optimizer")
    parameters = list(model.parameters())
    norm = global_grad_norm(parameters, rank)
    bad = [~in_range(torch.stack(hidden)), ~other_replicas_in_range(parameters, rank)]
    sums = sum_over_ranks(torch.cat([totals, torch.stack([each.to(totals) for each in bad])]))
    global_losses, (n_hidden, n_replicas) = sums[:-2], sums[-2:]
    is_sound = in_range(norm).to(sums.device) & global_losses.isfinite().all()
    if not is_sound & (n_hidden + n_replicas == 0):
        found = _found_after_backward(model, totals, hidden)
        raise _out_of_range(step, found, weights_are_good=not n_hidden, can_skip=True)
    if clip_norm:
        scale_grads(parameters, norm, clip_norm)
    counts_LE, exchanged = sum_counts(context, bool(routed_dispatchers(model)))
    update_biases(model, counts_LE)
    router_losses = mean_losses(model.config.moe, context, sum_over_ranks)
    optimizer.step()
    optimizer.zero_grad()
    updated()
    loss, *mtp_losses = global_losses.tolist()
    return StepResult(
        loss, float(norm), int(targets[0]), counts_LE.cpu(), tuple(mtp_losses), router_losses,
        dispatch_fields(context, exchanged),
    )  # fmt: skip


@dataclass(frozen=True)
class _Objective:
    """Divisors and factors of the losses of a microbatch, `[1 + MTP modules]`."""

    targets: Tensor
    """Targets of the model's loss and of each MTP module's in the whole step."""
    weights: Tensor
    z_loss_coef: float


def _forward_backward(
    model: Decoder,
    microbatches: list[Batch],
    objective: _Objective,
    context: StepContext,
    stop: Callable[[], bool],
    phase: Callable[[str], None],
    accumulation: Accumulation | None,
) -> Tensor | None:
    """This rank's losses summed over microbatches, gradients added up; None if `stop` returns
    true."""
    weights = objective.weights
    totals = torch.zeros_like(weights)
    for i, batch in enumerate(microbatches):
        phase("forward")
        if stop():
            return None
        if accumulation is not None:
            accumulation.begin(is_last=i == len(microbatches) - 1)
        microbatch = context.microbatch()
        losses = loss_sums(model, batch, len(weights) - 1, objective.z_loss_coef, microbatch)
        losses = losses / objective.targets.clamp(min=1)
        phase("backward")
        (losses * weights).sum().backward()
        totals += losses.detach()
    return totals


@contextmanager
def _watching(model: Decoder) -> Iterator[list[Tensor]]:
    """Collects, for every pass, the largest norm of a token's hidden state before the last norm.

    It contains the outputs of all layers. Norms convert a row whose squares overflow to zeros, and
    the loss then resembles that of an untrained model.
    """
    found: list[Tensor] = []

    def look(_: object, inputs: tuple[Tensor, ...]) -> None:
        x_TD = inputs[0].detach()
        found.append(torch.linalg.vector_norm(x_TD, dim=-1, dtype=torch.float32).max())

    handle = model.norm.register_forward_pre_hook(look)
    try:
        yield found
    finally:
        handle.remove()


def _state(model: Decoder) -> dict[str, Tensor]:
    """All tensors that determine the model's output: parameters and balancing biases."""
    names = {module: name for name, module in model.named_modules()}
    biases = {f"{names[router]}.bias_E": router.bias_E for router in routers(model)}
    return dict(model.named_parameters()) | biases


def _found_after_backward(model: Decoder, totals: Tensor, hidden: list[Tensor]) -> list[str]:
    """Values of a step that are out of range on this rank, causes first, as `_out_of_range`
    expects.

    Of gradients it reports the last of the model, since backward computes it first. The norm of all
    may be out of range although no value is; the largest norm of a parameter is then reported.
    """
    named = reversed(list(model.named_parameters()))
    gradients = {name: p.grad for name, p in named if p.grad is not None}
    norms = {name: float(local_of(grad).double().norm()) for name, grad in gradients.items()}
    largest = max(norms, key=lambda name: norms[name])
    return [
        "" if totals.isfinite().all() else f"the loss is {float(totals.sum())}",
        _named("before the last norm", {"a token's norm": torch.stack(hidden)}),
        _named("the gradient of", gradients),
        f"the gradient's norm is more than {LARGEST:.1e}: that of {largest} is "
        f"{norms[largest]:.3g}",
    ]


def _out_of_range(
    step: int, found: list[str], weights_are_good: bool, can_skip: bool
) -> NonFiniteError:
    """The error for the first invalid value on any rank. All ranks call it together.

    found: what is out of range on this rank, causes first; empty texts for values in range.
    """
    ranks_of: dict[str, list[str]] = {}
    reports = gather_json(found)
    for kind in range(len(found)):
        if not ranks_of:
            for rank, report in enumerate(reports):
                if report[kind]:
                    ranks_of.setdefault(report[kind], []).append(str(rank))
    told = [f"{what} on rank {', '.join(ranks[:8])}" for what, ranks in ranks_of.items()][:4]
    return NonFiniteError(
        f"step {step}: {', '.join(told)}; stopped before the optimizer step", weights_are_good,
        can_skip,
    )  # fmt: skip


def _named(what: str, tensors: dict[str, Tensor]) -> str:
    """The first tensor with a value out of range in this rank's part, that value, and the number of
    other tensors with one."""
    values = largest_values(tensors.values()).tolist()
    bad = {name: v for name, v in zip(tensors, values, strict=True) if not v <= LARGEST}
    if not bad:
        return ""
    name, value = next(iter(bad.items()))
    limit = f", more than {LARGEST:.1e}" if math.isfinite(value) else ""
    more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
    return f"{what} {name} has {value:.3g}{limit}{more}"

"""The training loss: cross-entropy summed over target tokens, of the model and its MTP modules.

Sums, not means: the step divides by the target tokens of all ranks and microbatches, so that
documents of unequal length have equal weight per token on every mesh. Ranks that divide the
vocabulary each return the loss of the targets in their part.

MTP module k reads token i + k at position i and predicts the model's target at i + k. If i + k is
in another document, or beyond the sequence, there is no target: the row passes through the block
(no token of its document follows it) and has no loss.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kernels.layers.cross_entropy import IGNORE, linear_cross_entropy
from models.decoder import Decoder, Output
from models.step_context import MicrobatchContext
from train.data.batches import Batch


def loss_sum(
    model: Decoder,
    batch: Batch,
    z_loss_coef: float = 0.0,
    context: MicrobatchContext | None = None,
) -> Tensor:
    """Sum of the negative log-likelihoods (nats) of a batch's targets, an fp32 scalar.

    context: of a training step; see `Decoder.forward`.
    """
    output = _cross_entropy(batch.targets_T, model.tp_comm.group, z_loss_coef, batch.losses_T)
    total: Tensor = model(batch.tokens_T, batch.positions_T, batch.core, output, context=context)
    return total


def loss_sums(
    model: Decoder,
    batch: Batch,
    mtp_depth: int,
    z_loss_coef: float = 0.0,
    context: MicrobatchContext | None = None,
) -> Tensor:
    """`loss_sum` of the model and of each MTP module, fp32 `[1 + mtp_depth]`.

    z_loss_coef: factor of the z-loss, which contributes only its gradient and does not change these
    values. context: of a training step; see `Decoder.forward`.
    """
    if not mtp_depth:
        return loss_sum(model, batch, z_loss_coef, context)[None]
    ahead, group = [], model.tp_comm.group
    for depth in range(1, mtp_depth + 1):
        successors_T, targets_T = look_ahead(batch, depth)
        ahead.append((successors_T, _cross_entropy(targets_T, group, z_loss_coef)))
    main = _cross_entropy(batch.targets_T, group, z_loss_coef, batch.losses_T)
    outputs = model(batch.tokens_T, batch.positions_T, batch.core, main, ahead, context)
    return torch.stack(outputs)


def count_tokens(batches: Sequence[Batch], mtp_depth: int) -> Tensor:
    """Tokens, targets of the model, targets of each MTP module: int64 `[2 + mtp_depth]`.

    On the batches' device, since those of the MTP modules are counted there.
    """
    tokens = sum(batch.tokens_T.numel() for batch in batches)
    counts = torch.tensor(
        [tokens, sum(batch.n_targets for batch in batches), *[0] * mtp_depth],
        device=batches[0].tokens_T.device,
    )
    for batch in batches:
        for depth in range(1, mtp_depth + 1):
            counts[1 + depth] += (look_ahead(batch, depth)[1] != IGNORE).sum()
    return counts


def look_ahead(batch: Batch, depth: int) -> tuple[Tensor, Tensor]:
    """Input and target of MTP module `depth` (from 1), both `[T]`: the token `depth` positions
    later, and the target there; token 0 and IGNORE if that is not in the same document."""
    # a position counts from the start of its document: only within it is the other `depth` larger
    same = _shifted(batch.positions_T, depth, -1) == batch.positions_T + depth
    successors_T = _shifted(batch.tokens_T, depth, 0) * same
    targets_T = torch.where(same, _shifted(batch.targets_T, depth, IGNORE), IGNORE)
    return successors_T, targets_T


def _shifted(values_T: Tensor, by: int, fill: int) -> Tensor:
    return F.pad(values_T, (0, by), value=fill)[by:]


def _cross_entropy(
    targets_T: Tensor,
    group: dist.ProcessGroup | None,
    z_loss_coef: float,
    losses_T: Tensor | None = None,
) -> Output:
    def output(x_TD: Tensor, head_VD: Tensor) -> Tensor:
        return linear_cross_entropy(x_TD, head_VD, targets_T, group, z_loss_coef, losses_T)

    return output


def source_losses(batches: Sequence[Batch], n_sources: int) -> Tensor:
    """Loss and target tokens of each source, summed over this rank's batches, which have run with
    `losses_T`: fp64 `[2, n_sources]` on the host. The loss is that of this rank's targets."""
    sums = torch.zeros(2, n_sources, dtype=torch.float64)
    of_batches = []
    for batch in batches:
        assert batch.losses_T is not None
        parts_of = batch.losses_T.split([n for _, n, _ in batch.sources])
        of_batches += [part.sum(dtype=torch.float64) for part in parts_of]
    losses = torch.stack(of_batches).cpu() if of_batches else torch.empty(0)
    parts = [part for batch in batches for part in batch.sources]
    for (source, _, n_targets), loss in zip(parts, losses, strict=True):
        sums[0, source] += loss
        sums[1, source] += n_targets
    return sums

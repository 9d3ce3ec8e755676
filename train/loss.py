"""The training loss: cross-entropy summed over target tokens."""

from torch import Tensor

from kernels.cross_entropy import linear_cross_entropy
from models.decoder import Decoder
from train.batches import Batch


def loss_sum(model: Decoder, batch: Batch) -> Tensor:
    """Sum of the negative log-likelihoods (nats) of a batch's targets, an fp32 scalar.

    A sum, not a mean: the caller divides by the target tokens of the whole step, over all ranks
    and microbatches, so that documents of unequal length weigh the same on every mesh.
    """

    def output(x_TD: Tensor, head_VD: Tensor) -> Tensor:
        return linear_cross_entropy(x_TD, head_VD, batch.targets_T, model.exchange.group)

    total: Tensor = model(batch.tokens_T, batch.positions_T, batch.core, output)
    return total

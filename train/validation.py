"""Held-out loss: the same sequences on every mesh, summed exactly over ranks."""

import math
from collections.abc import Callable, Iterable

import torch

from models.decoder import Decoder
from parallel.ranks import sum_over_ranks
from train.data.batches import Batch
from train.loss import loss_sum


def validation_loss(
    model: Decoder,
    batches: Iterable[Batch | None],
    filler: Batch,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
    tp_size: int = 1,
) -> float | None:
    """Mean loss per target token, nats. All ranks call it together.

    Args:
        model: The model.
        batches: This rank's share; None if it has no batch left and runs `filler`, uncounted, so
            that the collectives of the forward pass stay matched.
        filler: A batch.
        device: Where it runs.
        stop: Called before every batch, with the same result on all ranks; if true, None is
            returned.
        tp_size: Ranks with the same tokens; each counts its share of their loss.
    """
    model.eval()
    try:
        sums = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            for batch in batches:
                if stop():
                    return None
                loss = float(loss_sum(model, (batch or filler).to(device)))
                if batch is not None:
                    sums += torch.tensor([loss, batch.n_targets / tp_size])
        total, tokens = sum_over_ranks(sums).tolist()
        return total / tokens
    finally:
        model.train()


def bits_per_byte(loss: float, tokens: int, text_bytes: int) -> float:
    """Loss in bits per byte of text: nats per token, over ln 2, times tokens per byte."""
    return loss / math.log(2) * tokens / text_bytes

"""Held-out loss: the same sequences on every mesh, summed exactly over ranks."""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from models.decoder import Decoder
from parallel.ranks import sum_over_ranks
from train.data.batches import Batch, sequence_batch, validation_batches
from train.data.run_data import Source
from train.loss import loss_sum


def validate_sources(
    model: Decoder,
    sources: Sequence[Source],
    limit: int,
    micro_batch: int,
    device: torch.device,
    rank: int,
    n_ranks: int,
    stop: Callable[[], bool] = lambda: False,
    tp_size: int = 1,
) -> dict[str, float] | None:
    """The metrics of every validation set; None if `stop` returned true. All ranks call it
    together.

    Args:
        model: The model.
        sources: Those with a validation set; a single one has no name.
        limit: Sequences of each set; 0: all.
        micro_batch: Sequences per rank and pass.
        device: Where it runs.
        rank, n_ranks: Of the ranks that divide the sequences.
        stop, tp_size: See `validation_loss`.
    """
    fields: dict[str, float] = {}
    loss_sum, tokens, bits, n_bytes = 0.0, 0, 0.0, 0.0
    for source in sources:
        batches = validation_batches(source.held_out, limit, micro_batch, rank, n_ranks)
        filler = sequence_batch(source.held_out, np.zeros(1, np.int64))
        found = validation_loss(model, batches, filler, device, stop, tp_size)
        if found is None:
            return None
        loss, n_targets = found
        loss_sum, tokens = loss_sum + loss * n_targets, tokens + n_targets
        if source.held_out_bytes:
            text_bytes = n_targets * source.held_out_bytes / source.held_out_tokens
            bits += loss / math.log(2) * n_targets
            n_bytes += text_bytes
        if source.name:
            fields[f"validation_loss/{source.name}"] = loss
            fields[f"validation_perplexity/{source.name}"] = math.exp(min(loss, 700.0))
            if source.held_out_bytes:
                fields[f"validation_bits_per_byte/{source.name}"] = bits_per_byte(
                    loss, source.held_out_tokens, source.held_out_bytes
                )
    if not sources:
        return {}
    if len(sources) == 1:  # not by way of sums, which round
        whole = {"validation_loss": loss}
        if source.held_out_bytes:
            bits = bits_per_byte(loss, source.held_out_tokens, source.held_out_bytes)
            whole["validation_bits_per_byte"] = bits
        return whole | fields
    whole = {"validation_loss": loss_sum / tokens}
    if n_bytes:
        whole["validation_bits_per_byte"] = bits / n_bytes
    return whole | fields


def validation_loss(
    model: Decoder,
    batches: Iterable[Batch | None],
    filler: Batch,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
    tp_size: int = 1,
) -> tuple[float, int] | None:
    """Mean loss per target token, nats, and number of these. All ranks call it together.

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
        return total / tokens, round(tokens)
    finally:
        model.train()


def bits_per_byte(loss: float, tokens: int, text_bytes: int) -> float:
    """Loss in bits per byte of text: nats per token, over ln 2, times tokens per byte."""
    return loss / math.log(2) * tokens / text_bytes

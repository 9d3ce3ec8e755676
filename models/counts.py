"""How large a model is and what a token costs."""

from dataclasses import dataclass

import torch

from configs.schema import Model
from models.decoder import Decoder


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters. `active` counts those one token uses; the input embedding is part
    of both, and given apart because some published counts leave it out."""

    total: int
    active: int
    embedding: int
    experts: int


def parameter_counts(model: Model) -> ParameterCounts:
    """Counted on the meta device, so the counts are those of the model that trains."""
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in Decoder(model).named_parameters()}
    total = sum(sizes.values())
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    idle = experts - experts * model.moe.top_k // model.moe.n_experts
    return ParameterCounts(total, total - idle, sizes["embed.weight"], experts)


def flops_per_token(model: Model, seq_len: int) -> float:
    """Training FLOPs (forward and backward) per token of full sequences.

    6 per active matrix parameter (2 forward, 4 backward), the head and the router included, the
    embedding look-up not; attention scores and values over the causal half, on average
    (seq_len + 1) / 2 keys per query: 12 * heads * head_dim * keys.
    """
    counts = parameter_counts(model)
    # a tied embedding multiplies once, as the head; an untied one only looks up
    multiplied = counts.active - (0 if model.tie_embeddings else counts.embedding)
    norms = (2 * model.n_layers + 1) * model.d_model
    if model.qk_norm:
        norms += 2 * model.n_layers * model.head_dim
    keys = (seq_len + 1) / 2
    attention = 12 * model.n_layers * model.n_heads * model.head_dim * keys
    return 6 * (multiplied - norms) + attention

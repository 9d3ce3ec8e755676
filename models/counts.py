"""How large a model is and what a token costs."""

from dataclasses import dataclass

import torch

from configs.model import Model
from models.decoder import Decoder


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters. `active` counts those one token uses; the input embedding is part
    of both, and given apart because some published counts leave it out. MTP modules count in
    neither: published sizes leave them out, and serving may."""

    total: int
    active: int
    embedding: int
    mtp: int
    """Parameters of the MTP modules, which share embedding and head with the model."""
    experts: int
    """Of routed experts, in MTP modules too."""
    layers: tuple[tuple[int, int], ...]
    """(all parameters, those of routed experts) of every block, MTP modules last."""


def parameter_counts(model: Model) -> ParameterCounts:
    """Counted on the meta device, so the counts are those of the model that trains."""
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in Decoder(model).named_parameters()}
    layers, stacks = [], [("layers", model.n_layers), ("mtp", model.mtp_depth)]
    for prefix in [f"{stack}.{i}." for stack, count in stacks for i in range(count)]:
        own = {name: size for name, size in sizes.items() if name.startswith(prefix)}
        routed = sum(size for name, size in own.items() if ".experts." in name)
        layers.append((sum(own.values()), routed))
    mtp = sum(every for every, _ in layers[model.n_layers :])
    total = sum(sizes.values()) - mtp
    routed = sum(experts for _, experts in layers[: model.n_layers])
    idle = routed - routed * model.moe.top_k // model.moe.n_experts
    return ParameterCounts(
        total=total,
        active=total - idle,
        embedding=sizes["embed.weight"],
        mtp=mtp,
        experts=sum(experts for _, experts in layers),
        layers=tuple(layers),
    )


def flops_per_token(model: Model, seq_len: int) -> float:
    """Training FLOPs (forward and backward) per token of full sequences.

    6 per active matrix parameter (2 forward, 4 backward), the head and the router included, the
    embedding look-up and the vectors (norms, biases, sinks) not; attention: 6 * heads * (query
    width + value width) per key seen, and a query sees on average (seq_len + 1) / 2 keys, or what
    its window or chunk leaves of them. MTP modules are part of it, each with the head once more.
    """
    with torch.device("meta"):
        sizes = {name: p for name, p in Decoder(model).named_parameters()}
    share = model.moe.top_k / model.moe.n_experts
    head = model.vocab_size * model.d_model
    matrices = float(head * model.mtp_depth)
    for name, p in sizes.items():
        expert = ".experts." in name
        # a tied embedding multiplies once, as the head; an untied one only looks up
        looked_up = name == "embed.weight" and not model.tie_embeddings
        if p.ndim - expert >= 2 and not name.endswith(".b13") and not looked_up:
            matrices += p.numel() * (share if expert else 1.0)
    attention = model.attention
    per_key = 6 * attention.n_heads * (attention.qk_dim + attention.value_dim)
    blocks = [*range(model.n_layers), *[model.n_layers - 1] * model.mtp_depth]
    keys = sum(_keys_seen(model, index, seq_len) for index in blocks)
    return 6 * matrices + per_key * keys


def _keys_seen(model: Model, index: int, seq_len: int) -> float:
    """Keys that a query of layer `index` sees, averaged over a sequence."""
    attention = model.attention
    size = min(attention.local_size, seq_len)
    if attention.is_full(index):
        return (seq_len + 1) / 2
    if attention.local == "window":
        return (size * (size + 1) / 2 + (seq_len - size) * size) / seq_len
    rest = seq_len % size
    return ((seq_len - rest) * (size + 1) / 2 + rest * (rest + 1) / 2) / seq_len

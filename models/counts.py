"""The number of parameters of a model and the FLOPs of a token."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from configs.model import ModelConfig
from models.block import Block
from models.decoder import Decoder
from models.mtp import MtpModule


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters. `active` counts those that one token uses. The input embedding is
    included in both, and also listed separately because some published counts leave it out. MTP
    modules are in neither: published sizes leave them out, and serving may."""

    total: int
    active: int
    embedding: int
    mtp: int
    """Parameters of the MTP modules, which share embedding and head with the model."""
    experts: int
    """Of routed experts, including those of MTP modules."""
    layers: tuple[tuple[int, int], ...]
    """(all parameters, those of routed experts) of every block, MTP modules last."""


def parameter_counts(model: ModelConfig) -> ParameterCounts:
    """Count on the meta device, so that the counts are those of the trained model; of identical
    blocks one is counted."""
    outer = {name: p.numel() for name, p in _outer(model).items()}
    layers, known = [], dict[int, tuple[int, int]]()
    for parameters in _blocks(model):
        if id(parameters) not in known:
            own = {name: p.numel() for name, p in parameters.items()}
            routed = sum(size for name, size in own.items() if ".experts." in name)
            known[id(parameters)] = sum(own.values()), routed
        layers.append(known[id(parameters)])
    mtp = sum(every for every, _ in layers[model.n_layers :])
    total = sum(outer.values()) + sum(every for every, _ in layers[: model.n_layers])
    routed = sum(experts for _, experts in layers[: model.n_layers])
    idle = routed - routed * model.moe.top_k // model.moe.n_experts
    return ParameterCounts(
        total=total,
        active=total - idle,
        embedding=outer["embed.weight"],
        mtp=mtp,
        experts=sum(experts for _, experts in layers),
        layers=tuple(layers),
    )


def _outer(model: ModelConfig) -> dict[str, nn.Parameter]:
    """The parameters outside of the blocks, by name."""
    least = replace(model, n_layers=1, n_dense_layers=0, moe_every=1, mtp_depth=0)
    with torch.device("meta"):
        named = Decoder(least).named_parameters()
    return {name: p for name, p in named if not name.startswith("layers.")}


def _blocks(model: ModelConfig) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters of every block, MTP modules last; identical blocks share one object."""
    known = dict[tuple[bool, bool], dict[str, nn.Parameter]]()
    for i in range(model.n_layers + model.mtp_depth):
        kind = is_mtp, _ = i >= model.n_layers, model.is_moe(i)
        if kind not in known:
            with torch.device("meta"):
                block = MtpModule(model) if is_mtp else Block(model, i)
            known[kind] = dict(block.named_parameters())
        yield known[kind]


def flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Training FLOPs (forward and backward) per token of full sequences.

    6 per active matrix parameter (2 forward, 4 backward), including the head and the router,
    without the embedding look-up and the vectors (norms, biases, sinks). Attention: 6 * heads *
    (query width + value width) per unmasked key; a query has on average (seq_len + 1) / 2 of them,
    or fewer with a window or chunk. MTP modules are included, each with the head once more.
    """
    head = model.vocab_size * model.d_model
    # a tied embedding is multiplied once, as the head; an untied one only by look-up
    matrices, known = float(head * (model.mtp_depth + 1)), dict[int, float]()
    for parameters in _blocks(model):
        if id(parameters) not in known:
            known[id(parameters)] = _multiplied(model, parameters)
        matrices += known[id(parameters)]
    attention = model.attention
    per_key = 6 * attention.n_heads * (attention.qk_dim + attention.value_dim)
    blocks = [*range(model.n_layers), *[model.n_layers - 1] * model.mtp_depth]
    keys = sum(_keys_seen(model, index, seq_len) for index in blocks)
    return 6 * matrices + per_key * keys


def _multiplied(model: ModelConfig, parameters: dict[str, nn.Parameter]) -> float:
    """Parameters of the matrices of a block that each token is multiplied by."""
    share, found = model.moe.top_k / model.moe.n_experts, 0.0
    for name, p in parameters.items():
        expert = ".experts." in name
        if p.ndim - expert >= 2 and not name.endswith(".b13"):
            found += p.numel() * (share if expert else 1.0)
    return found


def _keys_seen(model: ModelConfig, index: int, seq_len: int) -> float:
    """Keys that a query of layer `index` attends to, averaged over a sequence."""
    attention = model.attention
    size = min(attention.local_size, seq_len)
    if attention.is_full(index):
        return (seq_len + 1) / 2
    if attention.local == "window":
        return (size * (size + 1) / 2 + (seq_len - size) * size) / seq_len
    rest = seq_len % size
    return ((seq_len - rest) * (size + 1) / 2 + rest * (rest + 1) / 2) / seq_len

"""How Hugging Face tensors map to ours.

Every Hugging Face tensor is a slice of one of ours, at most permuted and flattened: `w13[e, 0]` is
an expert's `gate_proj`; all of `w13`, its dimensions permuted, is GPT-OSS's `gate_up_proj`. So
export reads slices, import writes them, and neither rounds or computes. No permutation moves the
first dimension, so large tensors are converted in pieces of some rows.

The routed experts exist in two layouts: one tensor per expert and matrix, or all experts of a layer
fused in one. A family is published in one of them, but checkpoints exist in both.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from configs.model import ModelConfig

Layout = Literal["per_expert", "fused"]
"""Storage layout of the routed experts of a layer."""


@dataclass(frozen=True)
class HfTensor:
    """One tensor of the export: `ours[index]`, or zeros if `ours` is None."""

    name: str
    ours: str | None
    index: tuple[int, ...]
    shape: tuple[int, ...]
    permute: tuple[int, ...] = ()
    """Order of the dimensions of `ours[index]` in theirs, before it is reshaped to `shape`."""
    keep_fp32: bool = False
    """Balancing biases stay fp32 in every export: rounding them changes the choice of experts."""
    is_copy: bool = False
    """Written where readers expect another copy of a shared weight; never read."""

    def __post_init__(self) -> None:
        assert self.permute[:1] in ((), (0,)), f"{self.name}: pieces of rows must stay rows"

    def to_hf(self, part: Tensor) -> Tensor:
        """Their tensor, or as many rows of it, for rows of `ours[index]`."""
        value = part.permute(self.permute) if self.permute else part
        return value.reshape(part.shape[0], *self.shape[1:])

    def from_hf(self, theirs: Tensor, part_shape: torch.Size) -> Tensor:
        """Rows of `ours[index]`, which have `part_shape`, for as many of theirs."""
        if not self.permute:
            return theirs.reshape(part_shape)
        inverse = sorted(range(len(self.permute)), key=self.permute.__getitem__)
        return theirs.reshape([part_shape[i] for i in self.permute]).permute(inverse)


def outer_tensors(model: ModelConfig) -> tuple[list[HfTensor], list[HfTensor]]:
    """The tensors before and after the layers, the same in all families."""
    before = [plain("model.embed_tokens.weight", "embed.weight", model.vocab_size, model.d_model)]
    after = [plain("model.norm.weight", "norm.weight", model.d_model)]
    if not model.tie_embeddings:
        after.append(plain("lm_head.weight", "head.weight", model.vocab_size, model.d_model))
    return before, after


def mtp_tensors(model: ModelConfig, layer: int) -> Iterator[HfTensor]:
    """The tensors that an MTP module has in addition to a layer, in the names of DeepSeek-V3's
    published weights, which repeat embedding and head in every module."""
    theirs, ours, d_model = f"model.layers.{layer}.", prefix(model, layer), model.d_model
    for their_name, our_name in (("enorm",) * 2, ("hnorm",) * 2, ("shared_head.norm", "norm")):
        yield plain(f"{theirs}{their_name}.weight", f"{ours}{our_name}.weight", d_model)
    yield plain(f"{theirs}eh_proj.weight", f"{ours}eh_proj.weight", d_model, 2 * d_model)
    head = "embed.weight" if model.tie_embeddings else "head.weight"
    for their_name, shared in (("embed_tokens", "embed.weight"), ("shared_head.head", head)):
        shape = model.vocab_size, d_model
        yield HfTensor(f"{theirs}{their_name}.weight", shared, (), shape, is_copy=True)


def prefix(model: ModelConfig, layer: int) -> str:
    """Our name of their layer `layer`; layers beyond the last are MTP modules."""
    beyond = layer - model.n_layers
    return f"layers.{layer}." if beyond < 0 else f"mtp.{beyond}."


def plain(theirs: str, ours: str, *shape: int) -> HfTensor:
    """A tensor that is the whole of one of ours."""
    return HfTensor(theirs, ours, (), shape)


def gqa_tensors(model: ModelConfig, layer: int) -> Iterator[HfTensor]:
    """Norms and attention of a block with grouped-query attention."""
    theirs, ours, a = f"model.layers.{layer}.", prefix(model, layer), model.attention
    query, kv, d_model = a.n_heads * a.head_dim, a.kv_heads * a.head_dim, model.d_model
    yield plain(f"{theirs}input_layernorm.weight", f"{ours}attention_norm.weight", d_model)
    for their_name, our_name, rows, columns in (
        ("q_proj", "wq", query, d_model),
        ("k_proj", "wk", kv, d_model),
        ("v_proj", "wv", kv, d_model),
        ("o_proj", "wo", d_model, query),
    ):
        names = f"{theirs}self_attn.{their_name}", f"{ours}attention.{our_name}"
        yield plain(f"{names[0]}.weight", f"{names[1]}.weight", rows, columns)
        if a.bias:
            yield plain(f"{names[0]}.bias", f"{names[1]}.bias", rows)
    if a.sinks:
        yield plain(f"{theirs}self_attn.sinks", f"{ours}attention.sinks", a.n_heads)
    if a.qk_norm == "rms":
        for norm in ("q_norm", "k_norm"):
            names = f"{theirs}self_attn.{norm}.weight", f"{ours}attention.{norm}.weight"
            yield plain(*names, a.head_dim)
    yield plain(f"{theirs}post_attention_layernorm.weight", f"{ours}ffn_norm.weight", d_model)


def swiglu_tensors(
    theirs: str,
    ours: str | None,
    width: int,
    d_model: int,
    index: tuple[int, ...] = (),
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Iterator[HfTensor]:
    """Gate, up and down of one feed-forward or expert; `ours` None writes zeros."""
    w13, w2 = (None, None) if ours is None else (f"{ours}w13", f"{ours}w2")
    gate, up, down = (f"{theirs}{name}.weight" for name in names)
    yield HfTensor(gate, w13, (*index, 0), (width, d_model))
    yield HfTensor(up, w13, (*index, 1), (width, d_model))
    yield HfTensor(down, w2, index, (d_model, width))


def deepseek_moe_tensors(model: ModelConfig, layer: int, layout: Layout) -> Iterator[HfTensor]:
    """Router, balancing bias, shared and routed experts, in DeepSeek's and GLM's names.

    Their architectures always have a shared expert; if ours has none it is written as zeros, which
    add exactly zero.
    """
    theirs, ours = f"model.layers.{layer}.mlp.", f"{prefix(model, layer)}ffn."
    moe = model.moe
    yield plain(f"{theirs}gate.weight", f"{ours}router.weight", moe.n_experts, model.d_model)
    if moe.score_func == "sigmoid":
        bias = f"{theirs}gate.e_score_correction_bias", f"{ours}router.bias_E"
        yield HfTensor(*bias, (), (moe.n_experts,), keep_fp32=True)
    width = max(moe.n_shared_experts, 1) * moe.d_expert
    source = f"{ours}shared_experts." if moe.n_shared_experts else None
    yield from swiglu_tensors(f"{theirs}shared_experts.", source, width, model.d_model)
    yield from expert_tensors(model, f"{theirs}experts.", f"{ours}experts.", layout)


def expert_tensors(
    model: ModelConfig,
    theirs: str,
    ours: str,
    layout: Layout,
    fused: Literal["rows", "halves", "interleaved"] = "rows",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Iterator[HfTensor]:
    """The routed experts of a layer.

    Args:
        model: The model.
        theirs, ours: Prefixes of the names.
        layout: One tensor per expert and matrix, or all experts fused.
        fused: Layout of gate and up in `gate_up_proj`: concatenated along rows with the output
            dimension first (as in transformers for most families), or with the input dimension
            first, concatenated (Llama 4) or interleaved (GPT-OSS).
        names: Of an expert's matrices in the layout `per_expert`.
    """
    n, width, d_model = model.moe.n_experts, model.moe.d_expert, model.d_model
    w13, w2, b13, b2 = (f"{ours}{name}" for name in ("w13", "w2", "b13", "b2"))
    if layout == "per_expert":
        for e in range(n):
            yield from swiglu_tensors(f"{theirs}{e}.", ours, width, d_model, (e,), names)
            if model.moe.expert_bias:
                gate, up, down = (f"{theirs}{e}.{name}.bias" for name in names)
                yield HfTensor(gate, b13, (e, 0), (width,))
                yield HfTensor(up, b13, (e, 1), (width,))
                yield HfTensor(down, b2, (e,), (d_model,))
        return
    orders: dict[str, tuple[int, ...]] = {"halves": (0, 3, 1, 2), "interleaved": (0, 3, 2, 1)}
    up_shape, down_shape = (n, d_model, 2 * width), (n, width, d_model)
    down_order: tuple[int, ...] = (0, 2, 1)
    if fused == "rows":
        up_shape, down_shape, down_order = (n, 2 * width, d_model), (n, d_model, width), ()
    yield HfTensor(f"{theirs}gate_up_proj", w13, (), up_shape, orders.get(fused, ()))
    yield HfTensor(f"{theirs}down_proj", w2, (), down_shape, down_order)
    if model.moe.expert_bias:
        order = (0, 2, 1) if fused == "interleaved" else ()
        yield HfTensor(f"{theirs}gate_up_proj_bias", b13, (), (n, 2 * width), order)
        yield plain(f"{theirs}down_proj_bias", b2, n, d_model)

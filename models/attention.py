"""Attention layers around an exchangeable core.

The layer projects, normalizes and rotates; the *core* implements the mask and the attention. In
training that is `models.documents.DocumentAttention` (causal, within a document); the serving
engine passes a core with a paged KV cache. Both take tokens in one flat dimension.

GQA: arXiv:2305.13245. T tokens, D model width, H query heads, G key/value heads, C head width,
V value width.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from configs.model import AttentionConfig, ModelConfig
from models.layers.linear import Linear, project
from models.layers.local_view import LocalViews, local_view
from models.layers.norm import RMSNorm, l2_norm
from models.layers.rope import apply_rope, logit_scale
from models.tp_comm import TPComm

Tables = tuple[Tensor, Tensor]
"""cos and sin of every token, from `models.layers.rope.rope_tables`."""


@dataclass(frozen=True)
class Layer:
    """Properties of the calling layer that a core uses."""

    index: int
    """Index of the block, from 0."""
    scale: float
    """Factor on the logits."""
    window: int = 0
    """Number of tokens that a token attends to, itself included. 0: all."""
    chunk: int = 0
    """Size of the chunks of positions within which tokens attend. 0: all."""


class AttentionCore(Protocol):
    """Softmax attention of one layer over the keys that the implementation stores."""

    latent: "LatentCore | None"
    """Called by MLA instead, if the core stores latents and not their keys and values."""

    def __call__(
        self, layer: Layer, q_THC: Tensor, k_TGC: Tensor, v_TGV: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        """Output `[T, H, V]` for the queries. sinks_H: logits without values, or None."""
        ...


class LatentCore(Protocol):
    """Attention over latents."""

    def __call__(
        self, layer: Layer, q_THC: Tensor, latent_TR: Tensor, k_rope_TC: Tensor, wkv_b: Linear,
        config: AttentionConfig,
    ) -> Tensor:  # fmt: skip
        """Output `[T, H, V]` of MLA, whose keys and values are `expanded` from the latents."""
        ...


def layer_of(model: ModelConfig, index: int) -> Layer:
    """The properties of layer `index` for its core."""
    attention = model.attention
    local = 0 if attention.is_full(index) else attention.local_size
    return Layer(
        index=index,
        scale=attention.qk_dim**-0.5 * logit_scale(model.rope),
        window=local if attention.local == "window" else 0,
        chunk=local if attention.local == "chunk" else 0,
    )


class GroupedQueryAttention(LocalViews):
    """Projections, QK-norm, RoPE, core, output projection."""

    sinks: Any = local_view("sinks")

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        a = config.attention
        self.config, self.layer = a, layer_of(config, index)
        self.has_rope, self.interleaved = a.has_rope(index), config.rope.interleaved
        self.eps = config.norm_eps
        self.wq = Linear(config.d_model, a.n_heads * a.head_dim, bias=a.bias)
        self.wk = Linear(config.d_model, a.kv_heads * a.head_dim, bias=a.bias)
        self.wv = Linear(config.d_model, a.kv_heads * a.head_dim, bias=a.bias)
        self.wo = Linear(a.n_heads * a.head_dim, config.d_model, bias=a.bias)
        rms = a.qk_norm == "rms"
        self.q_norm = RMSNorm(a.head_dim, config.norm_eps) if rms else None
        self.k_norm = RMSNorm(a.head_dim, config.norm_eps) if rms else None
        sinks = nn.Parameter(torch.empty(a.n_heads)) if a.sinks else None
        self.register_parameter("sinks", sinks)
        self.tp_comm = TPComm()

    def forward(
        self, x_TD: Tensor, positions_T: Tensor, tables: Tables, core: AttentionCore
    ) -> Tensor:
        x_TD = self.tp_comm.gather(x_TD)
        heads = (x_TD.shape[0], -1, self.config.head_dim)
        projected = project(x_TD, self.wq, self.wk, self.wv)
        q_THC, k_TGC, v_TGC = (each.view(heads) for each in projected)
        if self.q_norm is not None and self.k_norm is not None:
            q_THC, k_TGC = self.q_norm(q_THC), self.k_norm(k_TGC)
        if self.has_rope:
            q_THC = apply_rope(q_THC, tables, self.interleaved)
            k_TGC = apply_rope(k_TGC, tables, self.interleaved)
            if self.config.qk_norm == "l2":
                q_THC, k_TGC = l2_norm(q_THC, self.eps), l2_norm(k_TGC, self.eps)
        elif self.config.temperature_floor:
            q_THC = q_THC * _temperature(positions_T, self.config).to(q_THC.dtype)
        o_THC = core(self.layer, q_THC, k_TGC, v_TGC, self.sinks)
        return self.tp_comm.reduce_scatter(self.wo(o_THC.reshape(x_TD.shape[0], -1)))


def _temperature(positions_T: Tensor, config: AttentionConfig) -> Tensor:
    """Factor on the queries of layers without RoPE, `[T, 1, 1]` (arXiv:2501.19399)."""
    steps = torch.floor((positions_T.float() + 1) / config.temperature_floor)
    return (torch.log1p(steps) * config.temperature_scale + 1)[:, None, None]


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Keys and values are projections of one narrow vector per token, which a cache may store instead;
    positions are encoded in a separate rotated part, whose keys all heads share. Queries may be
    compressed in the same way. Here the keys and values are expanded before the core.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        a = config.attention
        self.config, self.layer = a, layer_of(config, index)
        self.interleaved = config.rope.interleaved
        query_width = a.n_heads * a.qk_dim
        self.wq_a: Linear | None = None
        self.q_a_norm: RMSNorm | None = None
        if a.q_lora_rank:
            self.wq_a = Linear(config.d_model, a.q_lora_rank, bias=False)
            self.q_a_norm = RMSNorm(a.q_lora_rank, _LATENT_EPS)
        self.wq = Linear(a.q_lora_rank or config.d_model, query_width, bias=False)
        kv_a_width = a.kv_lora_rank + a.qk_rope_head_dim
        self.wkv_a = Linear(config.d_model, kv_a_width, bias=False)
        self.kv_a_norm = RMSNorm(a.kv_lora_rank, _LATENT_EPS)
        kv_width = a.n_heads * (a.qk_nope_head_dim + a.v_head_dim)
        self.wkv_b = Linear(a.kv_lora_rank, kv_width, bias=False)
        self.wo = Linear(a.n_heads * a.v_head_dim, config.d_model, bias=False)
        self.tp_comm = TPComm()

    def forward(
        self, x_TD: Tensor, positions_T: Tensor, tables: Tables, core: AttentionCore
    ) -> Tensor:
        a, compressed = self.config, x_TD
        if self.wq_a is not None and self.q_a_norm is not None:
            queries, kv_a = project(x_TD, self.wq_a, self.wkv_a)
            compressed = self.q_a_norm(queries)
        else:
            (kv_a,) = project(x_TD, self.wkv_a)
        # the vectors that all heads share are exchanged while they are narrow
        compressed, kv_a = self.tp_comm.gather(compressed), self.tp_comm.gather(kv_a)
        latent, k_rope = kv_a.split([a.kv_lora_rank, a.qk_rope_head_dim], dim=-1)
        n_tokens = compressed.shape[0]
        q_THC = self.wq(compressed).view(n_tokens, -1, a.qk_dim)
        q_plain, q_rope = q_THC.split([a.qk_nope_head_dim, a.qk_rope_head_dim], dim=-1)
        latent = self.kv_a_norm(latent)
        q_rope = apply_rope(q_rope, tables, self.interleaved)
        k_rope = apply_rope(k_rope[:, None], tables, self.interleaved)
        q_THC = torch.cat([q_plain, q_rope], dim=-1)
        if core.latent is not None:
            o_THV = core.latent(self.layer, q_THC, latent, k_rope[:, 0], self.wkv_b, a)
        else:
            k_THC, v_THV = expanded(latent, k_rope, self.wkv_b, a)
            o_THV = core(self.layer, q_THC, k_THC, v_THV, None)
        return self.tp_comm.reduce_scatter(self.wo(o_THV.reshape(n_tokens, -1)))


def expanded(
    latent_TR: Tensor, k_rope_T1C: Tensor, wkv_b: Linear, config: AttentionConfig
) -> tuple[Tensor, Tensor]:
    """Keys `[T, H, qk_dim]` and values `[T, H, V]` from MLA's latents and the part of the keys that
    all heads share."""
    plain, value = config.qk_nope_head_dim, config.v_head_dim
    k_plain, v_THV = (
        wkv_b(latent_TR).view(len(latent_TR), -1, plain + value).split([plain, value], -1)
    )
    return torch.cat([k_plain, k_rope_T1C.expand(-1, k_plain.shape[1], -1)], dim=-1), v_THV


_LATENT_EPS = 1e-6
"""DeepSeek's epsilon inside the compressions, for any epsilon of the other norms."""

"""Grouped-query attention around an exchangeable core.

The layer projects, normalises and rotates; what may look at what is the *core*'s business. In
training that is `DocumentAttention` (causal, within a document); the serving engine passes a core
that reads and writes a paged KV cache. Both see tokens in one flat dimension.

GQA: arXiv:2305.13245. T tokens, D model width, H query heads, G key/value heads, C head width,
B sequences, L their length.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from configs.schema import Model
from kernels.attention import document_attention
from models.norm import RMSNorm
from models.rope import apply_rope


class AttentionCore(Protocol):
    """Softmax attention of one layer over whatever keys the implementation holds."""

    def __call__(self, layer: int, q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor) -> Tensor:
        """Output `[T, H, C]` for the queries; `layer` counts blocks from 0."""
        ...


class Attention(nn.Module):
    """Projections, optional QK-norm (Qwen3: per head, before RoPE), core, output projection."""

    def __init__(self, config: Model, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        query_width = config.n_heads * config.head_dim
        kv_width = config.n_kv_heads * config.head_dim
        self.wq = nn.Linear(config.d_model, query_width, bias=False)
        self.wk = nn.Linear(config.d_model, kv_width, bias=False)
        self.wv = nn.Linear(config.d_model, kv_width, bias=False)
        self.wo = nn.Linear(query_width, config.d_model, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x_TD: Tensor, rope: tuple[Tensor, Tensor], core: AttentionCore) -> Tensor:
        heads = (x_TD.shape[0], -1, self.head_dim)
        q_THC, k_TGC = self.wq(x_TD).view(heads), self.wk(x_TD).view(heads)
        v_TGC = self.wv(x_TD).view(heads)
        if self.q_norm is not None and self.k_norm is not None:
            q_THC, k_TGC = self.q_norm(q_THC), self.k_norm(k_TGC)
        q_THC, k_TGC = apply_rope(q_THC, *rope), apply_rope(k_TGC, *rope)
        return self.wo(core(self.layer, q_THC, k_TGC, v_TGC).reshape(x_TD.shape[0], -1))


class DocumentAttention:
    """Causal attention that never crosses a document boundary; the training core.

    positions_BL: position of every token within its document; a document begins where it is 0.
    Each sequence attends to itself only, so a document cut by the end of a sequence begins anew.
    """

    def __init__(self, positions_BL: Tensor) -> None:
        self.batch, self.length = positions_BL.shape
        self.mask_BLL: Tensor | None = None
        if bool((positions_BL[:, 1:] == 0).any()):  # decided before the forward pass, on the host
            document_BL = (positions_BL == 0).cumsum(1)
            same = document_BL[:, :, None] == document_BL[:, None, :]
            self.mask_BLL = same.tril()

    def to(self, device: torch.device) -> "DocumentAttention":
        if self.mask_BLL is not None:
            self.mask_BLL = self.mask_BLL.to(device, non_blocking=True)
        return self

    def __call__(self, layer: int, q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor) -> Tensor:
        q, k, v = (self._split(x) for x in (q_THC, k_TGC, v_TGC))
        return document_attention(q, k, v, self.mask_BLL).transpose(1, 2).flatten(0, 1)

    def _split(self, x_TXC: Tensor) -> Tensor:
        """`[T, heads, C]` to `[B, heads, L, C]`."""
        return x_TXC.view(self.batch, self.length, *x_TXC.shape[1:]).transpose(1, 2)

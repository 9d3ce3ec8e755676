"""One transformer block; the decoder stacks them, and an MTP module contains one.

`Block.runner` is where activation recomputation is inserted: it may run the computation again in
backward (`parallel.recompute`). It is inside the module's call, so that hooks of the module run
once.

T tokens, D model width.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from configs.model import ModelConfig
from models.attention import AttentionCore, GroupedQueryAttention, LatentAttention, Tables
from models.layers.norm import RMSNorm
from models.moe import FeedForward, MoE
from models.step_context import LayerContext

Runner = Callable[..., Tensor]
"""Calls a block's computation with its arguments: `runner(compute, *arguments)`."""


def _run(compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return compute(*arguments)


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        latent = config.attention.kind == "mla"
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = (LatentAttention if latent else GroupedQueryAttention)(config, index)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        moe = config.is_moe(index)
        self.ffn = MoE(config) if moe else FeedForward(config.d_model, config.d_ff)

        self.runner: Runner = _run

    def forward(self, *arguments: Any) -> Tensor:
        """Call `compute` through the runner."""
        return self.runner(self.compute, *arguments)

    def compute(
        self,
        x_TD: Tensor,
        positions_T: Tensor,
        tables: Tables,
        core: AttentionCore,
        layer: LayerContext | None = None,
    ) -> Tensor:
        """layer: context of the training step, in blocks with experts (`models.step_context`)."""
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), positions_T, tables, core)
        normed_TD = self.ffn_norm(x_TD)
        if isinstance(self.ffn, MoE):
            return x_TD + self.ffn(normed_TD, layer)
        return x_TD + self.ffn(normed_TD)

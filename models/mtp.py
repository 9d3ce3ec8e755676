"""Multi-token prediction: small modules that predict the tokens after the next one.

Module k reads, at position i, the hidden state of depth k - 1 and the embedding of token i + k;
it predicts token i + k + 1 with the model's own head (DeepSeek-V3, arXiv:2412.19437, section 2.2).
So the causal chain of tokens is complete at every depth, and the model learns to plan further than
one token. In serving the modules may draft tokens for speculative decoding, or be left out.

The report does not specify which hidden state the next module reads. Here it is the input of the
head, after the final norm, as in the code that DeepSeek ships with its weights and in the drafts of
serving engines (with the state before the norm, the acceptance rate drops). The embedding is first
in the projected pair, as in the published weights.

T tokens, D model width.
"""

import torch
from torch import Tensor

from configs.model import ModelConfig
from models.attention import AttentionCore, Tables
from models.block import Block
from models.layers.linear import Linear
from models.layers.norm import RMSNorm
from models.step_context import LayerContext


class MtpModule(Block):
    """Two norms, a projection of both inputs to one, a block like the model's last one, a norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, config.n_layers - 1)
        self.enorm = RMSNorm(config.d_model, config.norm_eps)
        self.hnorm = RMSNorm(config.d_model, config.norm_eps)
        self.eh_proj = Linear(2 * config.d_model, config.d_model, bias=False)
        self.norm = RMSNorm(config.d_model, config.norm_eps)

    def compute(  # type: ignore[override]
        self,
        x_TD: Tensor,
        embedded_TD: Tensor,
        positions_T: Tensor,
        tables: Tables,
        core: AttentionCore,
        layer: LayerContext | None = None,
    ) -> Tensor:
        """Hidden states of this depth, ready for the head and for the next module.

        x_TD: those of the previous depth. embedded_TD: the embedding of each token's k-th
        successor.
        """
        pair_T2D = torch.cat([self.enorm(embedded_TD), self.hnorm(x_TD)], dim=-1)
        x_TD = super().compute(self.eh_proj(pair_T2D), positions_T, tables, core, layer)
        return self.norm(x_TD)

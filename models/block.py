"""One transformer block; the decoder stacks them, and an MTP module contains one.

T tokens, D model width.
"""

from torch import Tensor, nn

from configs.model import ModelConfig
from models.attention import AttentionCore, GroupedQueryAttention, LatentAttention, Tables
from models.moe import FeedForward, MoE
from models.norm import RMSNorm


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

    def forward(
        self, x_TD: Tensor, positions_T: Tensor, tables: Tables, core: AttentionCore
    ) -> Tensor:
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), positions_T, tables, core)
        return x_TD + self.ffn(self.ffn_norm(x_TD))

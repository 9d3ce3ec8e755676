"""The decoder: embedding, blocks, final norm, head. One definition for training and serving.

Tokens come in one flat dimension T; which of them belong together is known to the attention core
alone. What becomes of the last hidden states is the caller's choice: by default logits, in
training the loss (never holding all logits), in serving the logits of each request's last token.

T tokens, D model width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from configs.model import Model
from models.attention import AttentionCore, GroupedQueryAttention, LatentAttention, Tables
from models.exchange import Exchange
from models.moe import FeedForward, MoE
from models.norm import RMSNorm
from models.rope import rope_tables

Output = Callable[[Tensor, Tensor], Any]
"""What to make of the final hidden states `x_TD` and the head's weight `[V, D]`."""


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    def __init__(self, config: Model, index: int) -> None:
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


class Decoder(nn.Module):
    """The whole language model. Built on any device, the meta device included."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head: nn.Linear | None = None
        if not config.tie_embeddings:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.exchange = Exchange()

    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        core: AttentionCore,
        output: Output = F.linear,
    ) -> Any:
        """`output(x_TD, head_weight_VD)`; with the default, logits `[T, V]`.

        tokens_T, positions_T: integers; a position counts from the start of its document.
        """
        x_TD = self.embed(tokens_T)
        tables = rope_tables(positions_T, self.config.rope, self.config.attention.rope_dim)
        for block in self.layers:
            x_TD = block(x_TD, positions_T, tables, core)
        head = self.embed if self.head is None else self.head
        return output(self.exchange.gather(self.norm(x_TD)), head.weight)

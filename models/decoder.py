"""The decoder: embedding, blocks, final norm, head. One definition for training and serving.

Tokens have one flat dimension T; only the attention core distinguishes sequences. The argument
`output` computes the result from the last hidden states: by default logits, in training the loss
(without storing all logits), in serving the logits of each request's last token. The routers'
auxiliary losses are not part of the output: their gradient is added in backward
(`models.balance`), only in a training step, which passes the argument `context`.

T tokens, D model width, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from configs.model import ModelConfig
from models.attention import AttentionCore
from models.block import Block
from models.layers.embedding import Embedding
from models.layers.linear import Linear
from models.layers.norm import RMSNorm
from models.layers.rope import rope_tables
from models.moe import MoE
from models.mtp import MtpModule
from models.step_context import MicrobatchContext
from models.tp_comm import TPComm

Output = Callable[[Tensor, Tensor], Any]
"""Computes the result from the final hidden states `x_TD` and the head's weight `[V, D]`."""


class Decoder(nn.Module):
    """The whole language model. Built on any device, the meta device included."""

    def __init__(self, config: ModelConfig, layers: Iterable[int] | None = None) -> None:
        """layers: indices of the layers to build; by default all."""
        super().__init__()
        self.config = config
        layers = range(config.n_layers) if layers is None else layers
        self.embed = Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, index) for index in layers)
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mtp = nn.ModuleList(MtpModule(config) for _ in range(config.mtp_depth))
        self.head: Linear | None = None
        if not config.tie_embeddings:
            self.head = Linear(config.d_model, config.vocab_size, bias=False)
        self.tp_comm = TPComm()

    def blocks(self) -> list[Block]:
        """Every block, those of the MTP modules last: the units of sharding."""
        return [block for stack in (self.layers, self.mtp) for block in stack]  # type: ignore[misc]

    def moe_blocks(self) -> list[bool]:
        """For every block, in the order of `blocks`, whether it has experts."""
        return [isinstance(block.ffn, MoE) for block in self.blocks()]

    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        core: AttentionCore,
        output: Output = F.linear,
        mtp_outputs: Sequence[tuple[Tensor, Output]] = (),
        context: MicrobatchContext | None = None,
    ) -> Any:
        """`output(x_TD, head_weight_VD)`; with the default, logits `[T, V]`.

        Args:
            tokens_T, positions_T: Integers; a position counts from the start of its document.
            core: Attention over the tokens.
            output: Computes the result from the hidden states.
            mtp_outputs: For each MTP module to run, its input tokens (`[T]`, module k: the k-th
                successor of every token) and the function of its hidden states; the result is then
                a tuple of all outputs.
            context: Of a training step; routers then count and add the gradient of their auxiliary
                losses in backward.
        """
        x_TD = self.embed(tokens_T)
        tables = rope_tables(positions_T, self.config.rope, self.config.attention.rope_dim)
        n_blocks = len(self.layers) + len(self.mtp)
        layers = (None,) * n_blocks if context is None else context.layers
        for block, layer in zip(self.layers, layers[: len(self.layers)], strict=True):
            x_TD = block(x_TD, positions_T, tables, core, layer)
        head = self.embed if self.head is None else self.head
        x_TD = self.norm(x_TD)
        main = output(self.tp_comm.gather(x_TD), head.weight)
        if not mtp_outputs:
            return main
        outputs = [main]
        modules = zip(self.mtp, mtp_outputs, layers[len(self.layers) :], strict=True)
        for module, (successors_T, module_output), layer in modules:
            x_TD = module(x_TD, self.embed(successors_T), positions_T, tables, core, layer)
            outputs.append(module_output(self.tp_comm.gather(x_TD), head.weight))
        return tuple(outputs)

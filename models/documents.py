"""The attention core of training: causal, within a document, within a layer's window or chunk.

B sequences, L their length, T = B * L tokens, H query heads, G key/value heads, C head width.
"""

import torch
from torch import Tensor

from kernels.layers.attention import document_attention
from models.attention import Layer


class DocumentAttention:
    """Causal attention that never crosses a document boundary.

    positions_BL: position of every token within its document; a document begins at position 0.
    Attention stays within a sequence, so a document cut by the end of a sequence starts anew.
    """

    latent = None

    def __init__(self, positions_BL: Tensor) -> None:
        self.positions_BL = positions_BL
        self.batch, self.length = positions_BL.shape
        # decided before the forward pass, on the host
        self.has_boundaries = bool((positions_BL[:, 1:] == 0).any())
        self.longest = int(positions_BL.max()) + 1
        self._masks: dict[tuple[int, int], Tensor | None] = {}

    def to(self, device: torch.device) -> "DocumentAttention":
        """A copy on another device."""
        self.positions_BL = self.positions_BL.to(device, non_blocking=True)
        return self

    def __call__(
        self, layer: Layer, q_THC: Tensor, k_TGC: Tensor, v_TGV: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        q, k, v = (self._split(x) for x in (q_THC, k_TGC, v_TGV))
        out = document_attention(q, k, v, self.mask(layer), layer.scale, sinks_H)
        return out.transpose(1, 2).flatten(0, 1)

    # its conditions change with every batch, and each result would compile another graph
    @torch.compiler.disable
    def mask(self, layer: Layer) -> Tensor | None:
        """Bool `[B, L, L]`, true where a query (row) attends to a key; None for plain causal."""
        # a window or chunk longer than all documents needs no mask: layers then share one, or none
        window = layer.window if layer.window < self.longest else 0
        chunk = layer.chunk if layer.chunk < self.longest else 0
        if not (self.has_boundaries or window or chunk):
            return None
        if (window, chunk) not in self._masks:
            self._masks[window, chunk] = self._build(window, chunk)
        return self._masks[window, chunk]

    def _build(self, window: int, chunk: int) -> Tensor:
        positions = self.positions_BL
        document = (positions == 0).cumsum(1)
        allowed = (document[:, :, None] == document[:, None, :]).tril()
        if window:
            allowed &= positions[:, :, None] - positions[:, None, :] < window
        if chunk:
            allowed &= positions[:, :, None] // chunk == positions[:, None, :] // chunk
        return allowed

    def _split(self, x_TXC: Tensor) -> Tensor:
        """`[T, heads, C]` to `[B, heads, L, C]`."""
        return x_TXC.view(self.batch, self.length, *x_TXC.shape[1:]).transpose(1, 2)

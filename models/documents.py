"""The attention core of training: causal, within a document, within a layer's window or chunk.

Long sequences on a CPU are computed in pieces: documents, and parts of them if attention stays
within chunks. So time and memory are linear in the number of documents, and of windows or chunks of
a long one. Short documents that follow each other are one piece with a mask. Elsewhere all
documents of a sequence are computed together, with a mask of `[B, L, L]`.

B sequences, L their length, T = B * L tokens, H query heads, G key/value heads, C head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.layers.attention import document_attention
from kernels.layers.attention_cpu import SHORT
from models.attention import Layer


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens that attend only to each other."""

    length: int
    mask: Tensor | None = None
    """Bool `[n, n]`, if they are several documents; None: causal."""
    window: int = 0


class DocumentAttention:
    """Causal attention that never crosses a document boundary.

    positions_BL: position of every token within its document; a document begins at position 0.
    Attention stays within a sequence, so a document cut by the end of a sequence starts anew.
    """

    latent = None

    def __init__(self, positions_BL: Tensor) -> None:
        self.positions_BL = positions_BL
        self.batch, self.length = positions_BL.shape
        self.longest = int(positions_BL.max()) + 1
        first_BL = positions_BL == 0
        first_BL[:, 0] = True
        self._starts = first_BL.flatten().nonzero().flatten().tolist()
        """First tokens of all documents, in all sequences one after another."""
        # decided before the forward pass, on the host
        self.has_boundaries = len(self._starts) > self.batch
        self._masks: dict[tuple[int, int], Tensor] = {}
        self._pieces: dict[tuple[int, int], list[Piece]] = {}

    def to(self, device: torch.device) -> "DocumentAttention":
        """A copy on another device."""
        self.positions_BL = self.positions_BL.to(device, non_blocking=True)
        return self

    def __call__(
        self, layer: Layer, q_THC: Tensor, k_TGC: Tensor, v_TGV: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        if self.in_pieces:
            return self._by_piece(layer, q_THC, k_TGC, v_TGV, sinks_H)
        q, k, v = (self._split(x) for x in (q_THC, k_TGC, v_TGV))
        out = document_attention(q, k, v, self.mask(layer), layer.scale, sinks_H)
        return out.transpose(1, 2).flatten(0, 1)

    @property
    def in_pieces(self) -> bool:
        """Whether documents are computed one by one."""
        return self.positions_BL.device.type == "cpu" and self.length > SHORT

    def prepare(self, layer: Layer) -> None:
        """Build the masks of a layer, which its first call would build."""
        if self.in_pieces:
            self.pieces(layer)
        else:
            self.mask(layer)

    @property
    def mask_bytes(self) -> int:
        """Memory of all masks built so far."""
        cut = (piece.mask for pieces in self._pieces.values() for piece in pieces)
        return sum(mask.nbytes for mask in (*self._masks.values(), *cut) if mask is not None)

    # its conditions change with every batch, and each result would compile another graph
    @torch.compiler.disable
    def mask(self, layer: Layer) -> Tensor | None:
        """Bool `[B, L, L]`, true where a query (row) attends to a key; None for plain causal."""
        window, chunk = self._limits(layer)
        if not (self.has_boundaries or window or chunk):
            return None
        if (window, chunk) not in self._masks:
            documents = (self.positions_BL == 0).cumsum(1)
            self._masks[window, chunk] = _mask(self.positions_BL, documents, window, chunk)
        return self._masks[window, chunk]

    def _limits(self, layer: Layer) -> tuple[int, int]:
        """Window and chunk; 0 if longer than all documents: layers then share a mask, or need
        none."""
        window = layer.window if layer.window < self.longest else 0
        return window, layer.chunk if layer.chunk < self.longest else 0

    @torch.compiler.disable
    def _by_piece(
        self, layer: Layer, q_THC: Tensor, k_TGC: Tensor, v_TGV: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        pieces, outputs = self.pieces(layer), []
        parts = (x.split([piece.length for piece in pieces]) for x in (q_THC, k_TGC, v_TGV))
        for piece, *qkv in zip(pieces, *parts, strict=True):
            q, k, v = (x.transpose(0, 1)[None] for x in qkv)
            mask = None if piece.mask is None else piece.mask[None]
            # memory must not depend on the lengths of documents: `--check` does not know them
            out = document_attention(q, k, v, mask, layer.scale, sinks_H, piece.window, keep=False)
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs)

    def pieces(self, layer: Layer) -> list[Piece]:
        """The pieces of all sequences, one after another."""
        limits = self._limits(layer)
        if limits not in self._pieces:
            self._pieces[limits] = self._cut(*limits)
        return self._pieces[limits]

    def _cut(self, window: int, chunk: int) -> list[Piece]:
        total = self.positions_BL.numel()
        starts = self._starts
        if chunk:  # attention stays within a chunk, as within a document
            ends = [*starts[1:], total]
            starts = [i for s, e in zip(starts, ends, strict=True) for i in range(s, e, chunk)]
        pieces: list[Piece] = []
        begin, n_documents = 0, 0  # of the piece that grows
        for start, end in zip(starts, [*starts[1:], total], strict=True):
            if n_documents and end - begin > SHORT:
                pieces.append(self._piece(slice(begin, start), n_documents, window, chunk))
                begin, n_documents = start, 0
            n_documents += 1
        pieces.append(self._piece(slice(begin, total), n_documents, window, chunk))
        return pieces

    def _piece(self, rows: slice, n_documents: int, window: int, chunk: int) -> Piece:
        length = rows.stop - rows.start
        if n_documents == 1:
            return Piece(length, window=window if window < length else 0)
        positions = self.positions_BL.flatten()[rows]
        documents = (positions == 0).cumsum(0)
        return Piece(length, _mask(positions[None], documents[None], window, chunk)[0])

    def _split(self, x_TXC: Tensor) -> Tensor:
        """`[T, heads, C]` to `[B, heads, L, C]`."""
        return x_TXC.view(self.batch, self.length, *x_TXC.shape[1:]).transpose(1, 2)


def _mask(positions_BL: Tensor, documents_BL: Tensor, window: int, chunk: int) -> Tensor:
    """Bool `[B, L, L]`. documents_BL: a number for each token, equal within a document."""
    allowed = (documents_BL[:, :, None] == documents_BL[:, None, :]).tril()
    if window:
        allowed &= positions_BL[:, :, None] - positions_BL[:, None, :] < window
    if chunk:
        allowed &= positions_BL[:, :, None] // chunk == positions_BL[:, None, :] // chunk
    return allowed

"""The attention core of training: causal, within a document, within a layer's window or chunk.

Time and memory are linear in the number of documents, and of windows or chunks of a long one:

- On CUDA, in bf16, all documents are computed together by kernels that know where they begin
  (`kernels.layers.attention_varlen`); without boundaries, windows, chunks and sinks by torch's
  causal attention.
- In fp32 on CUDA, and for long sequences on a CPU, in pieces: documents, and parts of them if
  attention stays within chunks. Short documents that follow each other are one piece with a mask.
- For short sequences on a CPU all documents of a sequence together, with a mask of `[B, L, L]`.

B sequences, L their length, T = B * L tokens, H query heads, G key/value heads, C head width.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kernels.layers.attention import document_attention
from kernels.layers.attention_cpu import SHORT
from kernels.layers.attention_varlen import supports, varlen_attention
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
        self._rows: dict[int, tuple[Tensor, int]] = {}
        """By size of the chunks: first rows of documents, and the length of the longest one."""

    def to(self, device: torch.device) -> "DocumentAttention":
        """A copy on another device."""
        self.positions_BL = self.positions_BL.to(device, non_blocking=True)
        return self

    def __call__(
        self, layer: Layer, q_THC: Tensor, k_TGC: Tensor, v_TGV: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        is_plain = sinks_H is None and not (self.has_boundaries or any(self._limits(layer)))
        # torch may choose a kernel whose gradient has no fixed order of additions
        is_plain &= not torch.are_deterministic_algorithms_enabled()
        if not is_plain and _computes_together(q_THC, v_TGV):
            return self._varlen(layer, q_THC, k_TGC, v_TGV, sinks_H)
        if self.in_pieces and not (is_plain and q_THC.device.type != "cpu"):
            return self._by_piece(layer, q_THC, k_TGC, v_TGV, sinks_H)
        q, k, v = (self._split(x) for x in (q_THC, k_TGC, v_TGV))
        out = document_attention(q, k, v, self.mask(layer), layer.scale, sinks_H)
        return out.transpose(1, 2).flatten(0, 1)

    @property
    def in_pieces(self) -> bool:
        """Whether documents are computed one by one if they cannot be computed together."""
        return self.positions_BL.device.type != "cpu" or self.length > SHORT

    def prepare(self, layer: Layer) -> None:
        """Build the masks of a layer, which its first call would build on a CPU."""
        if self.positions_BL.device.type != "cpu":
            return
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
    def _varlen(
        self, layer: Layer, q_THC: Tensor, k_TGC: Tensor, v_TGV: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        window, chunk = self._limits(layer)
        if chunk not in self._rows:
            starts = [*self._cut_starts(chunk), self.positions_BL.numel()]
            longest = max(end - start for start, end in pairwise(starts))
            self._rows[chunk] = _sent(starts, self.positions_BL.device), longest
        starts_N1, longest = self._rows[chunk]
        return varlen_attention(
            q_THC, k_TGC, v_TGV, starts_N1, longest, layer.scale, sinks_H, window
        )

    def _cut_starts(self, chunk: int) -> list[int]:
        """First tokens of documents, and of chunks: attention stays within either."""
        starts = self._starts
        if not chunk:
            return starts
        ends = [*starts[1:], self.positions_BL.numel()]
        return [i for s, e in zip(starts, ends, strict=True) for i in range(s, e, chunk)]

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
        total, starts = self.positions_BL.numel(), self._cut_starts(chunk)
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


def _computes_together(q_THC: Tensor, v_TGV: Tensor) -> bool:
    """Whether one launch computes all documents."""
    return q_THC.device.type != "cpu" and supports(q_THC, v_TGV.shape[-1])


def _sent(values: list[int], device: torch.device) -> Tensor:
    """int32 on the device. From memory that is not pinned the copy could wait for kernels."""
    tensor = torch.tensor(values, dtype=torch.int32)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _mask(positions_BL: Tensor, documents_BL: Tensor, window: int, chunk: int) -> Tensor:
    """Bool `[B, L, L]`. documents_BL: a number for each token, equal within a document."""
    allowed = (documents_BL[:, :, None] == documents_BL[:, None, :]).tril()
    if window:
        allowed &= positions_BL[:, :, None] - positions_BL[:, None, :] < window
    if chunk:
        allowed &= positions_BL[:, :, None] // chunk == positions_BL[:, None, :] // chunk
    return allowed

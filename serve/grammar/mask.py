"""Bitmasks of tokens: bit `token % 32` of word `token // 32` is 1 if the token is allowed."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_LIMITS = np.where(
    (np.arange(256)[:, None] >> np.arange(8)) & 1, np.float32(np.inf), np.float32(-np.inf)
)
"""`[byte of a mask, its token]`: the largest logit that each of 8 tokens may have."""


def n_words(n_tokens: int) -> int:
    """Words of a mask."""
    return -(-n_tokens // 32)


def only(token: int, n_tokens: int) -> NDArray[np.int32]:
    """The mask `[words]` of a single token."""
    mask = np.zeros(n_words(n_tokens), np.uint32)
    mask[token // 32] = 1 << (token % 32)
    return mask.view(np.int32)


def pack(flags: NDArray[np.bool_]) -> NDArray[np.int32]:
    """The mask `[words]` of tokens with a flag."""
    padded = np.zeros(n_words(len(flags)) * 32, np.uint8)
    padded[: len(flags)] = flags
    return np.packbits(padded, bitorder="little").view(np.int32)


def apply_masks(logits_RV: Tensor, rows: list[int], masks_MW: NDArray[np.int32]) -> None:
    """Set the logits of tokens that are not allowed to minus infinity, in place, in these rows.

    On a CPU a logit becomes the smaller of itself and its limit: unlike an assignment, this has no
    branches, and its time does not depend on the mask.
    """
    n_tokens = logits_RV.shape[1]
    if logits_RV.device.type == "cpu":
        logits, bytes_MB = logits_RV.numpy(), masks_MW.view(np.uint8)
        limits = np.empty((bytes_MB.shape[1], 8), np.float32)
        for row, bytes_B in zip(rows, bytes_MB, strict=True):
            np.take(_LIMITS, bytes_B, axis=0, out=limits, mode="clip")  # "raise" copies `out`
            np.minimum(logits[row], limits.reshape(-1)[:n_tokens], out=logits[row])
        return
    words = torch.from_numpy(masks_MW).to(logits_RV.device)
    shifts = torch.arange(32, device=logits_RV.device, dtype=torch.int32)
    allowed_MV = ((words[:, :, None] >> shifts) & 1).flatten(1)[:, :n_tokens].bool()
    at = torch.tensor(rows, device=logits_RV.device)
    logits_RV[at] = logits_RV[at].masked_fill(~allowed_MV, -torch.inf)

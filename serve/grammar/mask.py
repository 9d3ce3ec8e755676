"""Bitmasks of tokens: bit `token % 32` of word `token // 32` is 1 if the token is allowed."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


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
    """Set the logits of tokens that are not allowed to minus infinity, in place, in these rows."""
    n_tokens = logits_RV.shape[1]
    if logits_RV.device.type == "cpu":
        refused = (~masks_MW).view(np.uint8)
        bits = np.unpackbits(refused, axis=1, count=n_tokens, bitorder="little").view(np.bool_)
        for row, refused_V in zip(rows, torch.from_numpy(bits), strict=True):
            logits_RV[row].masked_fill_(refused_V, -torch.inf)
        return
    words = torch.from_numpy(masks_MW).to(logits_RV.device)
    shifts = torch.arange(32, device=logits_RV.device, dtype=torch.int32)
    allowed_MV = ((words[:, :, None] >> shifts) & 1).flatten(1)[:, :n_tokens].bool()
    at = torch.tensor(rows, device=logits_RV.device)
    logits_RV[at] = logits_RV[at].masked_fill(~allowed_MV, -torch.inf)

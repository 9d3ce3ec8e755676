"""The experts of the tokens in the KV cache, in the same slots as their keys and values.

Because experts are stored by page, a reused prefix includes them, and a retracted request writes
them again. Two bytes per token, MoE layer and expert.

L MoE layers, T rows of a step, K experts per token.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MAX_EXPERTS = 1 << 16


class RoutingCache:
    """Experts by slot, `[slots, L, K]`."""

    def __init__(
        self, n_pages: int, page_size: int, n_layers: int, top_k: int, device: torch.device
    ) -> None:
        self.page_size = page_size
        # torch has few operations on uint16: int16 stores the same bits
        self.ids_SLK = torch.zeros(
            n_pages * page_size, n_layers, top_k, dtype=torch.int16, device=device
        )

    def write(self, slots_T: Tensor, ids_LTK: Tensor) -> None:
        """Store the experts of the rows of a step, which have these slots."""
        ids_TLK = ids_LTK.transpose(0, 1).to(torch.int16)  # wraps around: the same low bits
        self.ids_SLK.index_copy_(0, slots_T.to(self.ids_SLK.device), ids_TLK)

    def read(self, pages: list[int], n_tokens: int) -> NDArray[np.uint16]:
        """`[n_tokens, L, K]` of the sequence with these pages."""
        pages_P1 = torch.tensor(pages, dtype=torch.int64)[:, None]
        slots = (pages_P1 * self.page_size + torch.arange(self.page_size)).flatten()[:n_tokens]
        found: NDArray[np.int16] = self.ids_SLK[slots.to(self.ids_SLK.device)].cpu().numpy()
        return found.view(np.uint16)

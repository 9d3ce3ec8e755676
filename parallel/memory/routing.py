"""Prescribed choices of experts: routing is unknown before a run, so a trace uses the even choice
and the worst one.

T tokens of a router, K experts per token; ids are int64.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from configs.model import MoEConfig
from models.router import Router


@contextmanager
def chosen(ids_TK: Tensor) -> Iterator[None]:
    """Context in which every router returns `ids_TK`."""
    with patch.object(Router, "_given_choice", lambda *_: ids_TK.clone()):
        yield


def even(moe: MoEConfig, ep: int, n_tokens: int) -> Tensor:
    """The same number of tokens for every rank of `ep`, and about the same for every expert.

    It is not exact: if groups of rows are aligned, equal loads would either all fill their last
    rows, or all leave them half empty. Of two neighbors one has more by as much as the other has
    less.
    """
    n_local, experts = moe.n_experts // ep, torch.arange(moe.n_experts)
    pair_E = experts % n_local // 2
    more_E = (pair_E * 13 % 16 + 1) * (1 - 2 * (experts % n_local % 2))
    more_E[pair_E == n_local // 2] = 0  # the last of an odd number
    n_rows = n_tokens * moe.top_k
    each = n_rows // moe.n_experts
    ids_R = experts.repeat_interleave((more_E + each).clamp(min=0))
    return torch.cat([ids_R, experts.repeat(each + 1)])[:n_rows].view(-1, moe.top_k)


def one_sided(moe: MoEConfig, n_tokens: int, share: float = 1.0) -> Tensor:
    """A share of the tokens chooses the first experts, the others the last, which are on another
    rank."""
    first = torch.arange(moe.top_k)
    is_first = torch.arange(n_tokens)[:, None] < round(share * n_tokens)
    return torch.where(is_first, first, moe.n_experts - 1 - first)

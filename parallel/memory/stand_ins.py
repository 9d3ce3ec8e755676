"""What stands in for parts of a training step in a rehearsal (`parallel.memory.rehearsal`)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from models.documents import DocumentAttention
from models.router import Router
from parallel.memory.shadow import Ledger


class GivenChoice(Router):
    """A router whose choice is given."""

    given_tK: Tensor

    def _given_choice(self, logits_TE: Tensor) -> Tensor:
        return self.given_tK.clone()


class Documents(DocumentAttention):
    """Sequences of several documents, one of them nearly as long as the sequence."""

    def __init__(self, positions_BL: Tensor) -> None:
        self.positions_BL = positions_BL
        self.batch, self.length = positions_BL.shape
        self.has_boundaries, self.longest = True, self.length
        self._masks = {}


class Behind(torch.autograd.Function):
    """Calls a function when the gradients of some tensors are there, as FSDP2 does."""

    @staticmethod
    def forward(ctx: Any, call: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        return tensors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.call()
        return None, *grads


class Handed(torch.autograd.Function):
    """In backward, a gradient that was counted already comes into being."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ledger: Ledger, kind: str) -> Tensor:
        ctx.ledger, ctx.kind = ledger, kind
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.ledger.add(ctx.kind, -grad.nbytes)
        return torch.empty_like(grad), None, None

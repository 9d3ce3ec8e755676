"""Memory that the rows of experts take, evenly routed and at worst.

Nothing is dropped, so a router may send every token of all ranks to the experts of one: that rank
must hold them. These are upper bounds by counting the tensors that live at the same time, per row.
Kept until backward: the expert's input (D), gate and up (2 F), what the down projection reads (F).
At work in one layer besides: the rows before and behind the exchange and their gradients (4 D),
the gradients of gate, up and hidden (3 F), SwiGLU's fp32 arithmetic (5 F, on a CPU only). Indices:
48 bytes.

D model width, F expert width, K experts per token.
"""

from typing import NamedTuple

from configs.dispatch import Dispatch
from configs.model import Model


class RowMemory(NamedTuple):
    """Bytes of one rank."""

    kept: int
    """From forward to backward, all MoE layers."""
    at_work: int
    """On top while one layer runs."""


def received_rows(
    n_tokens: int, model: Model, ep: int, options: Dispatch, worst: bool = False
) -> int:
    """Rows in one layer of a rank whose group has `ep` ranks of `n_tokens` each.

    worst: all that can come; otherwise what comes when experts are chosen evenly.
    """
    top_k, local = model.moe.top_k, model.moe.n_experts // ep
    most = ep * n_tokens * min(top_k, local)
    if worst:
        return most
    even = n_tokens * top_k
    if options.kind == "sync_free":
        return min(int(even * options.capacity_factor) + ep, most)
    return even


def row_memory(
    n_tokens: int, model: Model, ep: int, options: Dispatch, itemsize: int, worst: bool = False
) -> RowMemory:
    """What rows take with `itemsize` bytes per value of the compute dtype; see `received_rows`."""
    received = received_rows(n_tokens, model, ep, options, worst)
    width, hidden = model.d_model, model.moe.d_expert
    layers = sum(model.is_moe(i) for i in range(model.n_layers))
    kept = received * (itemsize * (width + 3 * hidden) + 48)
    at_work = received * (itemsize * (4 * width + 3 * hidden) + 4 * 5 * hidden)
    sent = n_tokens * model.moe.top_k * (2 * itemsize * width + 48)
    return RowMemory(kept * layers, at_work + sent)

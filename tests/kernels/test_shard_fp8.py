"""A weight quantized in pieces has the bits of the whole weight, however it is divided."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.quantization.quantize import quantize_128x128
from kernels.quantization.shard import block_maxima, quantize_piece, scales_of

BOOLEAN = st.booleans()


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    rows=st.integers(1, 400), columns=st.integers(1, 300), experts=st.integers(1, 3),
    cuts=st.lists(st.floats(0, 1), max_size=4), along_rows=BOOLEAN, power_of_two=BOOLEAN,
    hard=BOOLEAN, seed=st.integers(0, 2**20),
)  # fmt: skip
def test_any_cut(
    rows: int, columns: int, experts: int, cuts: list[float], along_rows: bool,
    power_of_two: bool, hard: bool, seed: int,
) -> None:  # fmt: skip
    """Pieces of rows (of all experts one after another) or of columns, including empty ones."""
    torch.manual_seed(seed)
    w = torch.randn(experts, rows, columns) * 2.0 ** torch.randint(-30, 30, (experts, rows, 1))
    if hard:
        w[0, 0, 0], w[-1, -1, -1] = float("nan"), float("-inf")
    (data, scales), _ = quantize_128x128(w, power_of_two)
    per_expert = scales.shape[1]
    row = torch.arange(rows) // 128
    block_R = (torch.arange(experts)[:, None] * per_expert + row).flatten()
    flat, size = w.flatten(0, 1), experts * rows if along_rows else columns
    at = sorted({0, size, *(int(cut * size) for cut in cuts)})
    pieces = [slice(a, b) for a, b in zip(at, [*at[1:], size], strict=True)]

    def of(piece: slice, x: Tensor) -> tuple[Tensor, Tensor, int]:
        if along_rows:
            return x[piece], block_R[piece], 0
        return x[:, piece], block_R, piece.start

    maxima = torch.zeros(scales.flatten(0, 1).shape)
    for piece in pieces:  # each on a rank of its own; the maximum over ranks
        mine = torch.zeros_like(maxima)
        block_maxima(*of(piece, flat), mine)
        maxima = torch.maximum(maxima, mine)
    found = scales_of(maxima, power_of_two)
    assert torch.equal(found.nan_to_num(-1), scales.flatten(0, 1).nan_to_num(-1))
    out = torch.empty(flat.shape, dtype=torch.uint8)
    for piece in pieces:
        part = torch.empty(of(piece, flat)[0].shape, dtype=torch.uint8)
        quantize_piece(*of(piece, flat), found, part)
        if along_rows:
            out[piece] = part
        else:
            out[:, piece] = part
    nan = data.flatten(0, 1).float().isnan()
    assert torch.equal(out.view(data.dtype).float().isnan(), nan)
    same = out == data.flatten(0, 1).contiguous().view(torch.uint8)
    assert bool((same | nan).all())

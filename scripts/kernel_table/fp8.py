"""Quantization and FP8 products."""

from collections.abc import Callable
from functools import partial

import torch

from kernels.gemm import gemm_fp8_gluon, gemm_fp8_triton
from kernels.gemm.gemm_fp8_triton import TILES, Tile
from kernels.quantization import quantize_triton
from kernels.quantization.transpose_triton import to_row_major
from scripts.kernel_table.case import SIZE, Case


def cases() -> list[Case]:
    """Every configuration that the launchers can choose."""
    x = torch.empty(SIZE, SIZE, dtype=torch.bfloat16)
    found = []
    groups, blocks = quantize_triton.quantize_groups, quantize_triton.quantize_blocks
    forms = {"1x128": (True, False), "128x1": (False, True), "1x128 + 128x1": (True, True)}
    for powers, suffix in ((False, ""), (True, ", power of two")):
        for form, (rows, columns) in forms.items():
            launch: Callable[..., object] = partial(
                groups, x, power_of_two=powers, rows=rows, columns=columns
            )
            found.append(Case(f"quantize {form}{suffix}", launch, everyday=not powers))
        launch = partial(blocks, x[None], power_of_two=powers)
        found.append(Case(f"quantize 128x128{suffix}", launch, everyday=not powers))
    found.append(Case("transpose of FP8", _transpose))
    for tile in TILES:
        for layout in ("nt", "tn"):
            for out in ("bf16", "fp32"):
                name = f"gemm_fp8_{layout} {tile.rows}x{tile.columns} {out}"
                everyday = out == ("bf16" if layout == "nt" else "fp32")
                launch = partial(_gemm, gemm_fp8_triton.gemm, layout, out, tile=tile)
                found.append(Case(name, launch, True, everyday))
    for tile_rows in gemm_fp8_gluon.SLOTS:
        for layout in ("nt", "tn"):
            for out in ("bf16", "fp32"):
                launch = partial(_gemm, gemm_fp8_gluon.gemm, layout, out, rows=tile_rows)
                everyday = tile_rows == 256 and out == ("bf16" if layout == "nt" else "fp32")
                name = f"gemm_fp8_{layout} Gluon {tile_rows}x128 {out}"
                found.append(Case(name, launch, True, everyday, ("sm_90",)))
    return found


def _transpose(fp8: torch.dtype) -> None:
    to_row_major(torch.empty(1, SIZE, SIZE, dtype=fp8).mT)


def _gemm(
    launcher: Callable[..., None], layout: str, out: str, fp8: torch.dtype, **options: Tile | int
) -> None:
    """NN is NT on transposed views: the same machine code."""
    blocks = SIZE // 128
    a, column_scales = torch.empty(SIZE, SIZE, dtype=fp8), torch.empty(blocks, SIZE).T
    scales_b = torch.empty(blocks, blocks) if layout == "nt" else column_scales
    c = torch.empty(SIZE, SIZE, dtype=torch.bfloat16 if out == "bf16" else torch.float32)
    launcher(a, column_scales, a, scales_b, c, **options)

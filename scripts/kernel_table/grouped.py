"""Grouped products, and the quantization that restarts with every group.

NN in FP8 is NT on transposed views: the same machine code.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kernels.gemm import gemm_fp8_gluon
from kernels.gemm.gemm_fp8_triton import TILES, Tile
from kernels.group_schedule import schedule
from kernels.grouped_gemm import grouped_gemm_fp8_gluon
from kernels.grouped_gemm.grouped_gemm_triton import BF16_TILES, by_groups, by_rows
from kernels.quantization import quantize_triton
from scripts.kernel_table.case import SIZE, Case

EXPERTS, BLOCKS = 8, SIZE // 128


def cases() -> list[Case]:
    """Every configuration that the launchers can choose."""
    ends = torch.empty(EXPERTS, dtype=torch.int64)
    found = []
    for split, name in ((True, "true tiles first"), (False, "in order")):
        launch: Callable[..., object] = partial(_schedule, ends, split)
        found.append(Case(f"schedule of groups, {name}", launch))
    for rows, name in ((False, "128x1"), (True, "1x128 + 128x1")):
        found.append(Case(f"quantize {name} grouped", partial(_quantise, ends, rows)))
    for tile in TILES:
        for out in ("bf16", "fp32"):
            name = f"grouped_gemm_fp8_nt {tile.rows}x{tile.columns} {out}"
            launch = partial(_fp8_by_rows, ends, out, tile)
            found.append(Case(name, launch, True, out == "bf16"))
    for align in (128, 32, 1):
        for out in ("bf16", "fp32"):
            name = f"grouped_gemm_fp8_tn align {align} {out}"
            launch = partial(_fp8_by_groups, ends, align, out)
            # without alignment there is no TMA, which `multiplies` requires
            found.append(Case(name, launch, align > 1, out != "bf16"))
    for tile_rows in gemm_fp8_gluon.SLOTS:
        for out in ("bf16", "fp32"):
            launch = partial(_gluon_by_rows, ends, out, tile_rows)
            name, everyday = f"Gluon {tile_rows}x128 {out}", tile_rows == 256
            found.append(
                Case(f"grouped_gemm_fp8_nt {name}", launch, True, everyday and out == "bf16",
                     ("sm_90",))
            )  # fmt: skip
            launch = partial(_gluon_by_groups, ends, out, tile_rows)
            found.append(
                Case(f"grouped_gemm_fp8_tn {name}", launch, True, everyday and out == "fp32",
                     ("sm_90",))
            )  # fmt: skip
    for tile in BF16_TILES:
        for layout in ("nt", "nn"):
            name = f"grouped_gemm_{layout} {tile.rows}x{tile.columns} bf16"
            launch = partial(_by_rows, ends, layout, torch.bfloat16, tile)
            found.append(Case(name, launch, True, cores="bf16"))
    for out in ("bf16", "fp32"):
        launch = partial(_by_groups, ends, torch.bfloat16, out)
        found.append(Case(f"grouped_gemm_tn {out}", launch, True, out != "bf16", cores="bf16"))
    for layout in ("nt", "nn"):
        launch = partial(_by_rows, ends, layout, torch.float32, None)
        found.append(Case(f"grouped_gemm_{layout} fp32", launch, everyday=layout == "nt"))
    launch = partial(_by_groups, ends, torch.float32, "fp32")
    found.append(Case("grouped_gemm_tn of fp32", launch))
    return found


def _schedule(ends: Tensor, split: bool, fp8: torch.dtype) -> None:
    schedule(ends, ends, SIZE, 128, split)


def _quantise(ends: Tensor, rows: bool, fp8: torch.dtype) -> None:
    x = torch.empty(SIZE, SIZE, dtype=torch.bfloat16)
    quantize_triton.quantize_groups(x, fp8, False, rows, True, (ends, ends))


def _fp8_by_rows(ends: Tensor, out: str, tile: Tile, fp8: torch.dtype) -> None:
    a, w = torch.empty(SIZE, SIZE, dtype=fp8), torch.empty(EXPERTS, SIZE, SIZE, dtype=fp8)
    scales_a, scales_w = torch.empty(BLOCKS, SIZE).T, torch.empty(EXPERTS, BLOCKS, BLOCKS)
    c = torch.empty(SIZE, SIZE, dtype=torch.bfloat16 if out == "bf16" else torch.float32)
    by_rows(a, scales_a, w, scales_w, ends, ends, c, tile=tile)


def _fp8_by_groups(ends: Tensor, align: int, out: str, fp8: torch.dtype) -> None:
    a, scales = torch.empty(SIZE, SIZE, dtype=fp8).T, torch.empty(BLOCKS + EXPERTS, SIZE)
    by_groups(a, scales, a, scales, ends, ends, _experts(out), align)


def _gluon_by_rows(ends: Tensor, out: str, rows: int, fp8: torch.dtype) -> None:
    a, w = torch.empty(SIZE, SIZE, dtype=fp8), torch.empty(EXPERTS, SIZE, SIZE, dtype=fp8)
    scales_a, scales_w = torch.empty(BLOCKS, SIZE).T, torch.empty(EXPERTS, BLOCKS, BLOCKS)
    c = torch.empty(SIZE, SIZE, dtype=torch.bfloat16 if out == "bf16" else torch.float32)
    grouped_gemm_fp8_gluon.by_rows(a, scales_a, w, scales_w, ends, ends, c, rows=rows)


def _gluon_by_groups(ends: Tensor, out: str, rows: int, fp8: torch.dtype) -> None:
    a, scales = torch.empty(SIZE, SIZE, dtype=fp8).T, torch.empty(BLOCKS + EXPERTS, SIZE)
    grouped_gemm_fp8_gluon.by_groups(
        a, scales, a, scales, ends, ends, _experts(out), 128, rows=rows
    )


def _by_rows(
    ends: Tensor, layout: str, dtype: torch.dtype, tile: Tile | None, fp8: torch.dtype
) -> None:
    a, w = torch.empty(SIZE, SIZE, dtype=dtype), torch.empty(EXPERTS, SIZE, SIZE, dtype=dtype)
    w = w.mT if layout == "nn" else w
    by_rows(a, None, w, None, ends, ends, torch.empty_like(a), tile=tile)


def _by_groups(ends: Tensor, dtype: torch.dtype, out: str, fp8: torch.dtype) -> None:
    a = torch.empty(SIZE, SIZE, dtype=dtype)
    by_groups(a, None, a, None, ends, ends, _experts(out))


def _experts(out: str) -> Tensor:
    dtype = torch.bfloat16 if out == "bf16" else torch.float32
    return torch.empty(EXPERTS, SIZE, SIZE, dtype=dtype)

"""`python -m scripts.kernel_table`: every Triton kernel compiled for every target, as a table.

Needs no GPU: `kernels.offline` compiles what the launchers would launch. The table goes to
docs/kernels.md between its two marks; `--check` compiles and prints without writing.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import triton

from kernels import gemm_fp8_gluon, gemm_fp8_triton, quantize_triton, swiglu_triton
from kernels.gemm_fp8_triton import TILES, Tile
from kernels.offline import Build, offline

PAGE = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"
MARKS = ("<!-- table: begin -->", "<!-- table: end -->")
TARGETS: dict[str, tuple[str, int | str]] = {
    "sm_90": ("cuda", 90),
    "sm_100": ("cuda", 100),
    "gfx942": ("hip", "gfx942"),
    "gfx950": ("hip", "gfx950"),
}
TENSOR_CORES = {"sm_90": "QGMMA", "sm_100": "UTCQMMA", "gfx942": "MFMA", "gfx950": "MFMA"}
_SIZE = 4096


@dataclass(frozen=True)
class Case:
    """One configuration of one kernel."""

    name: str
    launch: Callable[..., object]
    """Launches it on operands in this FP8 type."""
    multiplies: bool = False
    """Whether tensor cores, and TMA where there is any, belong in its code."""
    everyday: bool = True
    """Whether continuous integration compiles it; the others differ from such a one in one type."""
    targets: tuple[str, ...] = tuple(TARGETS)
    """Those it is written for."""


def fp8_of(target: str) -> torch.dtype:
    """The e4m3 of a target."""
    return torch.float8_e4m3fnuz if target == "gfx942" else torch.float8_e4m3fn


def cases() -> list[Case]:
    """Every kernel with every configuration that its launcher can choose."""
    x = torch.empty(_SIZE, _SIZE, dtype=torch.bfloat16)
    found = []
    groups, blocks = quantize_triton.quantize_groups, quantize_triton.quantize_blocks
    forms = {"1x128": (True, False), "128x1": (False, True), "1x128 + 128x1": (True, True)}
    for powers, suffix in ((False, ""), (True, ", power of two")):
        for form, (rows, columns) in forms.items():
            launch: Callable[..., object] = partial(
                groups, x, power_of_two=powers, rows=rows, columns=columns
            )
            found.append(Case(f"quantize {form}{suffix}", launch, everyday=not powers))
        launch = partial(blocks, x, power_of_two=powers)
        found.append(Case(f"quantize 128x128{suffix}", launch, everyday=not powers))
    for tile in TILES:
        for layout in ("nt", "tn"):
            for out in ("bf16", "fp32", "fp32 +="):
                name = f"gemm_fp8_{layout} {tile.rows}x{tile.columns} {out}"
                everyday = out == ("bf16" if layout == "nt" else "fp32 +=")
                launch = partial(_gemm, gemm_fp8_triton.gemm, layout, out, tile=tile)
                found.append(Case(name, launch, True, everyday))
    for layout in ("nt", "tn"):
        for out in ("bf16", "fp32", "fp32 +="):
            launch = partial(_gemm, gemm_fp8_gluon.gemm, layout, out)
            everyday = out == ("bf16" if layout == "nt" else "fp32 +=")
            found.append(Case(f"gemm_fp8_{layout} Gluon {out}", launch, True, everyday, ("sm_90",)))
    weights, h = torch.empty(_SIZE), torch.empty(_SIZE, _SIZE // 2, dtype=torch.bfloat16)
    found.append(Case("swiglu", lambda fp8: swiglu_triton.swiglu_forward(x, weights)))
    found.append(Case("swiglu backward", lambda fp8: swiglu_triton.swiglu_backward(h, x, weights)))
    return found


def build(case: Case, target: str) -> Build:
    """Compile one case for one target."""
    with offline(*TARGETS[target]) as builds:
        case.launch(fp8_of(target))
    (only,) = builds
    return only


def _gemm(
    launcher: Callable[..., None], layout: str, out: str, fp8: torch.dtype, **options: Tile
) -> None:
    """NN is NT on transposed views: the same machine code."""
    blocks = _SIZE // 128
    a, column_scales = torch.empty(_SIZE, _SIZE, dtype=fp8), torch.empty(blocks, _SIZE).T
    scales_b = torch.empty(blocks, blocks) if layout == "nt" else column_scales
    c = torch.empty(_SIZE, _SIZE, dtype=torch.bfloat16 if out == "bf16" else torch.float32)
    launcher(a, column_scales, a, scales_b, c, out == "fp32 +=", **options)


def table() -> list[str]:
    """The table's lines, in Markdown."""
    lines = [
        "| kernel | target | registers | spilled | shared memory | instructions |",
        "|---|---|---|---|---|---|",
    ]
    for case in cases():
        for target in case.targets:
            made = build(case, target)
            instructions = ", ".join(f"{name} {n}" for name, n in made.instructions.items() if n)
            lines.append(
                f"| {case.name} | {target} | {made.registers} | {made.spilled} | {made.shared:,} "
                f"| {instructions} |"
            )
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Compile everything, print it, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m scripts.kernel_table", description=__doc__)
    parser.add_argument("--check", action="store_true", help="print only, leave the page as it is")
    options = parser.parse_args()
    lines = table()
    if options.check:
        return
    heading = f"{time.strftime('%Y-%m-%d')}, Triton {triton.__version__}:"
    before, rest = PAGE.read_text().split(MARKS[0])
    _, after = rest.split(MARKS[1])
    body = "\n".join([MARKS[0], heading, "", *lines, MARKS[1]])
    PAGE.write_text(before + body + after)


if __name__ == "__main__":
    main()

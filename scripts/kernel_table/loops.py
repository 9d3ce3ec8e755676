"""`python -m scripts.kernel_table.loops`: inner loops of the FP8 products on Hopper, as a table.

It compiles every product for sm_90 without a GPU, reads its machine code (`sass`) and adds the
speed that `model` predicts. The rows of the running version of Triton are replaced in
docs/kernels.md, those of other versions are kept; `--check` prints only.
"""

from dataclasses import dataclass
from pathlib import Path

import triton

from configs.command_line import CommandParser
from scripts.kernel_table import fp8, grouped
from scripts.kernel_table.case import Case, build
from scripts.kernel_table.model import Shape, Tiling, per_step, predicted_tflops, step_clocks
from scripts.kernel_table.offline import Build
from scripts.kernel_table.sass import Loop, inner_loops

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
MARKS = ("<!-- loops: begin -->", "<!-- loops: end -->")
HEAD = (
    "| Triton | product | tile | registers, spilled | stages | instructions per warp and step | "
    "loads before QGMMA | loads waited for | FMUL before QGMMA | clocks per step: tensor, issue, "
    "L2, group alone | predicted TFLOP/s |"
)
"""One column per property."""
DENSE = (Shape(4096, 4096, 4096), Shape(8192, 8192, 2048), Shape(16384, 5120, 8192))
BY_ROWS = (Shape(4096, 4096, 2048, 8, True), Shape(4096, 4096, 7168, 8, True))
BY_GROUPS = (Shape(4096, 2048, 4096, 8), Shape(4096, 7168, 4096, 8))


@dataclass(frozen=True)
class Product:
    """An FP8 product with the name of its case."""

    case: str
    tiling: Tiling
    shapes: tuple[Shape, ...]


TRITON = Tiling(rows=128, columns=128, warps=8, groups=1)
TRITON_TN = Tiling(rows=128, columns=128, warps=8, groups=1, ahead=False)
GLUON = Tiling(rows=256, columns=128, warps=8, groups=2)
PRODUCTS = (
    Product("gemm_fp8_nt 128x128 bf16", TRITON, DENSE),
    Product("gemm_fp8_tn 128x128 fp32", TRITON_TN, DENSE),
    Product("grouped_gemm_fp8_nt 128x128 bf16", TRITON, BY_ROWS),
    Product("grouped_gemm_fp8_tn align 128 fp32", TRITON_TN, BY_GROUPS),
    Product("gemm_fp8_nt Gluon 256x128 bf16", GLUON, DENSE),
    Product("gemm_fp8_tn Gluon 256x128 fp32", GLUON, DENSE),
    Product("grouped_gemm_fp8_nt Gluon 256x128 bf16", GLUON, BY_ROWS),
    Product("grouped_gemm_fp8_tn Gluon 256x128 fp32", GLUON, BY_GROUPS),
)
"""NN is NT on transposed views: the same machine code."""


def loops_of(case: Case) -> tuple[Build, list[Loop]]:
    """A case compiled for Hopper, and its inner loops."""
    made = build(case, "sm_90")
    return made, inner_loops(made.code)


def row(product: Product, made: Build, loops: list[Loop]) -> str:
    """One line of the table. Of several groups' loops, the longest counts."""
    loops = [per_step(loop, product.tiling) for loop in loops]
    worst = max(loops, key=lambda loop: loop.instructions)
    clocks = step_clocks(product.tiling, worst)
    speeds = ", ".join(
        f"{shape.name}: {predicted_tflops(shape, product.tiling, worst):,.0f}"
        for shape in product.shapes
    )
    cells = (
        triton.__version__,
        product.case,
        f"{product.tiling.rows}x{product.tiling.columns}",
        f"{made.registers}, {made.spilled}",
        stages(made),
        " / ".join(f"{loop.instructions:.0f}" for loop in loops),
        max(loop.loads_before for loop in loops),
        max(loop.waited_loads for loop in loops),
        max(loop.scalings_before for loop in loops),
        ", ".join(f"{value:,.0f}" for value in clocks.values()),
        speeds,
    )
    return f"| {' | '.join(map(str, cells))} |"


def stages(made: Build) -> int:
    """Steps in flight: Gluon's slots, or Triton's stages."""
    source = made.kernel.src
    if "SLOTS" in source.fn.arg_names:
        return int(source.constants[(source.fn.arg_names.index("SLOTS"),)])
    return int(made.kernel.metadata.num_stages)


def table() -> list[str]:
    """The rows of the running version of Triton."""
    by_name = {case.name: case for family in (fp8, grouped) for case in family.cases()}
    rows = []
    for product in PRODUCTS:
        rows.append(row(product, *loops_of(by_name[product.case])))
        print(rows[-1], flush=True)
    return rows


def page_with(text: str, rows: list[str]) -> str:
    """The page with these rows instead of those of the same versions of Triton."""
    before, rest = text.split(MARKS[0])
    old, after = rest.split(MARKS[1])
    versions = {line.split("|")[1] for line in rows}
    kept = [
        line for line in old.splitlines()
        if line.startswith("| 3.") and line.split("|")[1] not in versions
    ]  # fmt: skip
    lines = [HEAD, "|---" * (HEAD.count("|") - 1) + "|", *sorted([*kept, *rows], key=_order)]
    return "\n".join([before + MARKS[0], *lines, MARKS[1] + after])


def _order(line: str) -> tuple[int, str]:
    version, case = line.split("|")[1:3]
    names = [product.case for product in PRODUCTS]
    place = names.index(case.strip()) if case.strip() in names else len(names)
    return place, version


def main() -> None:
    """Compile the products, print their rows, and write the page."""
    parser = CommandParser(prog="python -m scripts.kernel_table.loops", description=__doc__)
    parser.add_argument("--check", action="store_true", help="print only, leave the page as it is")
    options = parser.parse_args()
    rows = table()
    if not options.check:
        PAGE.write_text(page_with(PAGE.read_text(), rows))


if __name__ == "__main__":
    main()

"""`python -m scripts.kernel_table`: every Triton kernel compiled for every target, as a table.

It needs no GPU: `scripts.kernel_table.offline` compiles what the launchers would launch. The table
is written to docs/kernels.md between its two marks; `--check` compiles and prints without writing.
"""

import time
from pathlib import Path

import triton

from configs.command_line import CommandParser
from scripts.kernel_table import elementwise, fp8, grouped, moe, paged_attention, swiglu
from scripts.kernel_table.case import Case, build

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
MARKS = ("<!-- table: begin -->", "<!-- table: end -->")
FAMILIES = (fp8, grouped, swiglu, elementwise, moe, paged_attention)


def cases() -> list[Case]:
    """Every kernel with every configuration that its launcher can choose."""
    return [case for family in FAMILIES for case in family.cases()]


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
    parser = CommandParser(prog="python -m scripts.kernel_table", description=__doc__)
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

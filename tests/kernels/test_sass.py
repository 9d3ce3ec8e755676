"""The reader of inner loops, on machine code written by hand."""

import pytest

from scripts.kernel_table.loops import HEAD, MARKS, PAGE, PRODUCTS, page_with
from scripts.kernel_table.model import Shape, Tiling, per_step, predicted_tflops, step_clocks
from scripts.kernel_table.sass import Loop, inner_loops

CODE = """
        /*0000*/                   LDG.E R9, desc[UR4][R2.64] ;
.L_x_1:
        /*0010*/                   IMAD R1, R2, R3, R4 ;
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R7 ;
{before}
        /*0030*/              @!P0 BRA `(.L_x_7) ;
.L_x_8:
        /*0040*/                   WARPGROUP.ARRIVE ;
        /*0050*/                   QGMMA.64x16x32.F32.E4M3.E4M3 R24, gdesc[UR8], RZ, !UPT ;
{between}
        /*0060*/                   QGMMA.64x16x32.F32.E4M3.E4M3 R24, gdesc[UR8], R24, gsb0 ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
{after}
        /*0080*/                   FFMA R40, R24, R10, R40 ;
        /*0090*/               @P1 BRA `(.L_x_3) ;
        /*00a0*/                   STG.E desc[UR4][R2.64], R40 ;
        /*00b0*/                   IMAD R2, R2, R2, R2 ;
.L_x_3:
        /*00c0*/               @P2 BRA `(.L_x_1) ;
        /*00d0*/                   EXIT ;
.L_x_7:
        /*00e0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R7 ;
        /*00f0*/               @!P0 BRA `(.L_x_7) ;
        /*0100*/                   BRA `(.L_x_8) ;
"""
LOAD = "        /*1000*/                   LDG.E R9, desc[UR4][R2.64] ;"
SCALE = "        /*1010*/                   FMUL R10, R9, R11 ;"


def loop(before: str = "", between: str = "", after: str = "") -> Loop:
    (found,) = inner_loops(CODE.format(before=before, between=between, after=after))
    return found


def test_counts() -> None:
    found = loop()
    assert (found.steps, found.products, found.waits, found.fused) == (1, 2, 1, 1)
    assert found.instructions == 10  # without the two that a branch skips
    assert found.per_tile == 2
    assert found.promotion == 8
    assert found.loads_before == found.waited_loads == found.scalings_before == 0


def test_loads_and_scales() -> None:
    """A load is hidden if its value is used after a product of which the wait lies between."""
    assert loop(before=LOAD).loads_before == 1
    used_at_once = loop(before=f"{LOAD}\n{SCALE}")
    assert used_at_once.waited_loads == used_at_once.scalings_before == 1
    late = loop(after=f"{LOAD}\n{SCALE}")
    assert (late.loads_before, late.waited_loads, late.scalings_before) == (0, 1, 0)
    hidden = loop(between=LOAD, after=SCALE)
    assert (hidden.loads_before, hidden.waited_loads, hidden.scalings_before) == (0, 0, 0)
    assert loop(between=SCALE).scalings_before == 1


def test_code_without_products() -> None:
    with pytest.raises(ValueError, match="no loop with QGMMA"):
        inner_loops(CODE.replace("QGMMA", "HGMMA").format(before="", between="", after=""))


def test_model() -> None:
    """By hand: 128x128, 8 warps in step, 100 instructions of which 80 are not overlapped."""
    tiling = Tiling(rows=128, columns=128, warps=8, groups=1)
    made = Loop(1, 100, 4, 1, 80, 0, 0, 0, 64, 200)
    clocks = step_clocks(tiling, made)
    assert clocks["tensor cores"] == 512 and clocks["issue"] == 200
    assert clocks["a group alone"] == 512 + 2 * 80 + 80
    assert clocks["L2"] == pytest.approx(1012, abs=1)
    # one round of 32 steps, limited by L2
    shape = Shape(128, 128 * 132, 4096)
    seconds = 32 * clocks["L2"] / 1.755e9
    assert predicted_tflops(shape, tiling, made) == pytest.approx(shape.operations / seconds / 1e12)


def test_waves_are_one_step() -> None:
    """256 rows on 8 warps are two waves of 4 products, each behind a barrier."""
    tiling = Tiling(rows=256, columns=128, warps=8, groups=2)
    made = per_step(Loop(2, 100, 4, 1, 80, 0, 0, 0, 64, 200), tiling)
    assert (made.steps, made.instructions, made.products, made.waits) == (1, 200, 8, 2)
    assert step_clocks(tiling, made)["a group alone"] == 512 + 160 + 2 * 80


def test_page_is_complete() -> None:
    """Every product has a row of both versions of Triton, in the present columns."""
    text = PAGE.read_text()
    table = text.split(MARKS[0])[1].split(MARKS[1])[0].strip().splitlines()
    assert table[0] == HEAD
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[2:]]
    assert {(row[0], row[1]) for row in cells} == {
        (version, product.case) for version in ("3.6.0", "3.9.0") for product in PRODUCTS
    }
    assert all(row[3].endswith(", 0") for row in cells), "spilled registers"


def test_rows_of_other_versions_stay() -> None:
    old = f"a\n{MARKS[0]}\n| 3.6.0 | x | 1 |\n| 3.9.0 | x | 2 |\n{MARKS[1]}\nb"
    page = page_with(old, ["| 3.9.0 | x | 3 |"])
    assert "| 3.6.0 | x | 1 |" in page and "| 3.9.0 | x | 3 |" in page and "| 2 |" not in page
    assert page_with(page, ["| 3.9.0 | x | 3 |"]) == page

"""N ranks equal one process: loss, gradient norm, every gradient, weights after two steps.

Tolerance: 1e-5 of each tensor's norm in fp32 with SGD, 1e-9 in fp64 with AdamW; sums over ranks are
in another order, which costs about 1e-7 and 1e-16. Routing must agree exactly; the seed is one for
which no choice of experts depends on the last digits.
"""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.models.families import FAMILIES
from tests.parallel.mesh.meshes import (
    MANY,
    ODD,
    ONCE,
    Case,
    all_meshes,
    alone,
    hard_meshes,
    pairs,
    pairwise,
    thirds,
)
from tests.runs import run

GLM4 = "glm4-mtp"
RECOMPUTED = [
    Case(GLM4, 1, 2, 2, 2, 2, (("recompute", "full"),)),
    Case(GLM4, 1, 2, 2, 4, 1, (("recompute", "selective"), ("recompute_keep", ("exchange",)))),
    Case(GLM4, 2, 1, 2, 2, 1, (("recompute", "full"), ("recompute_every", 2))),
    Case("deepseek-v3", 1, 2, 2, 4, 1, (("recompute", "selective"),)),
    Case(GLM4, 1, 2, 2, 4, 1, (("recompute_swiglu", True), ("prefetch", 0))),
    Case(GLM4, 1, 2, 2, 4, 1, (("reshard_after_forward", False), ("prefetch", 0))),
    Case(GLM4, 1, 4, 1, 2, 1, (("cpu_offload", True), ("prefetch", 2))),
]
ACCUMULATED = [
    Case(GLM4, 1, 2, 2, 4, 1, (("zero_stage", 1),)),
    Case(GLM4, 1, 4, 1, 1, 1, (("zero_stage", 1), ("expert_zero_stage", 3), ("recompute", "full"))),
    Case(GLM4, 2, 2, 1, 2, 1, (("zero_stage", 2), ("expert_zero_stage", 1))),
    Case(GLM4, 1, 2, 2, 2, 2, (("zero_stage", 3), ("expert_zero_stage", 2), ("prefetch", 2))),
    Case(GLM4, 1, 4, 1, 4, 1, (("zero_stage", 1), ("cpu_offload", True))),
    Case(
        GLM4,
        2,
        1,
        2,
        2,
        1,
        (("zero_stage", 2), ("recompute", "selective")),
        (("kind", "sync_free"), ("capacity_factor", 0.5)),
    ),
]
DISPATCHED = [
    Case(GLM4, 1, 2, 2, 4, 1, (), (("kind", "hierarchical"), ("node_size", 2))),
    Case(GLM4, 1, 2, 2, 4, 1, (("recompute", "full"),), (("chunks", 3),)),
    Case(GLM4, 1, 2, 2, 2, 2, (), (("kind", "sync_free"), ("capacity_factor", 2.0))),
    Case(GLM4, 1, 4, 1, 4, 1, (("recompute", "full"),),
         (("kind", "sync_free"), ("capacity_factor", 0.5))),
]  # fmt: skip
HARD = [case for family in FAMILIES if family != GLM4 for case in hard_meshes(family)]
# the undivided weights of the last block are gathered when it runs again, not in forward
GATHERED_AGAIN = Case("llama4", 1, 1, 2, 1, 2, (("recompute", "selective"),))
ODD_FAMILIES = [ODD + family for family in (GLM4, "deepseek-v3", "gpt-oss", "llama4")]
OF_FAMILIES = [
    replace(RECOMPUTED[2], family="glm4-bare"),
    replace(ACCUMULATED[1], family="glm4"), replace(RECOMPUTED[6], family="deepseek-v3-mtp"),
    replace(DISPATCHED[1], family="llama4"), replace(DISPATCHED[3], family="deepseek-v2"),
]  # fmt: skip
"""On four ranks what `COVER` has on two."""
FULL = {
    2: [*all_meshes(GLM4, 2), GATHERED_AGAIN],
    3: all_meshes(ODD + GLM4, 3),
    4: all_meshes(GLM4, 4) + HARD + RECOMPUTED + ACCUMULATED + DISPATCHED + OF_FAMILIES,
    # each family has a different one, the first has all pairs of axes
    6: pairwise(ODD + GLM4, 6) + [thirds(family)[i] for i, family in enumerate(ODD_FAMILIES)],
    8: [*pairwise(GLM4, 8), Case("glm4-bare", 2, 2, 2, 2, 2)],
}
COVER = {
    2: [[
        Case("deepseek-v3-mtp", 1, 1, 2, 1, 1, RECOMPUTED[6].more),
        replace(GATHERED_AGAIN, family=ONCE + "llama4"),
        Case(ONCE + "glm4-bare", 1, 1, 2, 2, 1, RECOMPUTED[2].more, DISPATCHED[1].dispatch),
        Case(GLM4, 1, 2, 1, 1, 1, ACCUMULATED[1].more),
        Case(ONCE + "deepseek-v3", 1, 1, 2, 2, 1, RECOMPUTED[3].more),
        Case("deepseek-v2", 1, 2, 1, 2, 1, DISPATCHED[3].more, DISPATCHED[3].dispatch),
    ]],
    4: [
        [
            replace(RECOMPUTED[1], family=ONCE + "qwen3", dispatch=DISPATCHED[0].dispatch,
                    more=(*RECOMPUTED[1].more, ("recompute_swiglu", True))),
            replace(ACCUMULATED[2], family="glm4"),
            Case("mixtral", 2, 1, 2, 1, 2, RECOMPUTED[5].more),
            replace(DISPATCHED[2], family="gpt-oss",
                    more=(*RECOMPUTED[0].more, *ACCUMULATED[3].more)),
        ],
    ],
    3: [[
        Case(ODD + "glm4", 1, 3, 1, 3, 1), Case(ODD + "glm4", 1, 1, 3, 1, 3),
        Case(ODD + "glm4", 3, 1, 1, 1, 1),
    ]],
}  # fmt: skip
"""Every family, option and dispatcher, pair of axes of two ranks and axis of three, at least once;
the cases of one list share a start of their ranks. Options that do not depend on a pair of axes are
on two ranks, which take half the time of four. Several options may be in one case, and MTP
modules, which cost as much as the layers, are in few. Some cases that keep nothing between
microbatches have one a step (`ONCE`)."""
WHOLE = (COVER[4][0][1], COVER[4][0][3])
"""In these, which divide over all axes, the harness's way to assemble weights is compared with
torch's."""
FAULTY = {
    Case("gpt-oss", 1, 1, 2, 2, 1, fault="expert gradient / ep"): "grad/layers.1.ffn.experts.w13",
    Case("gpt-oss", 1, 1, 2, 1, 1, fault="router not reduced over tp"): (
        "grad/layers.1.ffn.router.weight"
    ),
    Case("gpt-oss", 1, 1, 2, 1, 1, fault="norm not reduced over tp"): (
        "grad/layers.1.attention_norm.weight"
    ),
    Case("gpt-oss", 1, 1, 2, 1, 2, fault="down bias twice"): "grad/layers.1.ffn.experts.w2",
    Case("gpt-oss", 1, 2, 1, 1, 1, fault="mean of means"): "curve",
    Case("gpt-oss", 1, 1, 2, 2, 1, fault="repeated shard"): "grad/layers.1.ffn.experts.w13",
}
"""Tensors in which an inserted fault must be detected; it may also affect others."""


def train(
    folder: Path, cases: Iterable[Case], references: Path, double: bool = False, steps: int = 2
) -> None:
    """Run all cases, which have the same number of ranks, in one start of those ranks.

    One process chooses a seed, and its results are the reference; more ranks use that seed. The
    second step uses state of the first: weights, biases, and FSDP2's recorded order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cases, listed = list(cases), []
    for case in cases:
        settings = case.settings()
        if case.world > 1:
            seed = references / f"{alone(case.family).name}.seed"
            settings["run"]["seed"] = int(seed.read_text())
        told = {"name": case.name, "settings": settings, "fault": case.fault, "steps": steps}
        listed.append(told | {"whole": case in WHOLE})
    (folder / "cases.json").write_text(json.dumps(listed))
    more = ["--double"] if double else []
    script = "tests/parallel/mesh/mesh_run.py"
    run(script, folder, folder / "cases.json", *more, ranks=cases[0].world, timeout=3600)


def assert_equal(cases: list[Case], references: Path, folder: Path) -> None:
    train_alone({case.family for case in cases}, references)
    train(folder, cases, references)
    found = [error for case in cases for error in errors(case, folder, references)]
    assert not found, "\n".join(found)


def train_alone(families: Iterable[str], references: Path) -> None:
    """Train those of the families that have no reference yet in one process."""
    cases = [alone(family) for family in sorted(families)]
    new = [case for case in cases if not (references / f"{case.name}.seed").exists()]
    if new:
        train(references, new, references)


def errors(
    case: Case, ours: Path, references: Path, tolerance: float = 1e-5, steps: int = 2
) -> list[str]:
    """Every tensor that differs from the reference by more than the tolerance."""
    got = load_file(ours / f"{case.name}.safetensors")
    expected = load_file(references / f"{alone(case.family).name}.safetensors")
    if steps == 1:
        got, expected = of_first_step(got), of_first_step(expected)
    assert got.keys() == expected.keys()
    found = []
    for name, right in expected.items():
        difference = (got[name].double() - right.double()).norm()
        error = float(difference / right.double().norm().clamp(min=1e-30))
        if not error <= (0.0 if name.startswith("counts/") else tolerance):
            found.append(f"{case.name}: {name}: {error:.1e}")
    return found


def of_first_step(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {name: t for name, t in tensors.items() if name.startswith(("grad/", "counts/1"))}
    return found | {"curve": tensors["curve"][:1]}


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the families trained by one process, each when it is first needed."""
    return tmp_path_factory.mktemp("one")


@pytest.mark.long
@pytest.mark.parametrize(
    "cases", [cases for listed in COVER.values() for cases in listed],
    ids=lambda cases: ", ".join(case.name for case in cases),
)  # fmt: skip
def test_many_ranks_equal_one_process(cases: list[Case], references: Path, tmp_path: Path) -> None:
    assert_equal(cases, references, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", FULL)
def test_every_combination_equals_one_process(ranks: int, references: Path, tmp_path: Path) -> None:
    assert_equal(FULL[ranks], references, tmp_path)


def test_the_cover_leaves_nothing_out() -> None:
    """Covered parts of the full lists: families, options, dispatchers, and pairs of axes."""
    full = [case for listed in FULL.values() for case in listed]
    cover = [case for listed in COVER.values() for cases in listed for case in cases]
    # six ranks combine what two and three have, and eight what two and four have
    assert {case.world for case in full} - {6, 8} == {case.world for case in cover}
    odd = [case for case in cover if case.family.startswith(ODD)]
    for axis in ("dp_replicate", "dp_shard", "tp", "ep", "etp"):
        assert any(getattr(case, axis) == 3 for case in odd)
    full = [case for case in full if not case.family.startswith(ODD)]
    for part in (
        lambda case: {case.family.removeprefix(ONCE)},
        lambda case: set(case.more),
        lambda case: set(case.dispatch),
        pairs,
    ):
        missing = set().union(*map(part, full)) - set().union(*map(part, cover))
        assert not missing


@pytest.mark.long
@pytest.mark.parametrize(
    "case",
    [Case("gpt-oss", 1, 1, 2, 1, 2), *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (Case("gpt-oss", 1, 2, 2, 2, 2), Case(GLM4, 1, 2, 2, 2, 2),
                     Case(GLM4, 2, 1, 2, 2, 1)))],
    ids=lambda case: case.name,
)  # fmt: skip
def test_adamw_in_double_precision(case: Case, tmp_path: Path) -> None:
    axes = {2: (1, 2, 1, 2, 1), 4: (1, 2, 2, 4, 1)}[case.world]
    no_decay = Case(case.family, *axes, fault="experts without decay")
    train(tmp_path, [alone(case.family)], tmp_path, double=True)
    train(tmp_path, [case, no_decay], tmp_path, double=True)
    found = errors(case, tmp_path, tmp_path, 1e-9)
    assert not found, "\n".join(found)
    plain = [e for e in errors(no_decay, tmp_path, tmp_path, 0.1) if ": weight/" in e]
    assert plain and all(".experts.w" in error for error in plain), plain


@pytest.mark.long
def test_the_harness_sees_faults(references: Path, tmp_path: Path) -> None:
    train_alone({case.family for case in FAULTY}, references)
    train(tmp_path, FAULTY, references, steps=1)
    for case, where in FAULTY.items():
        found = errors(case, tmp_path, references, steps=1)
        assert any(f": {where}: " in error for error in found), (case.name, found[:5])


@pytest.mark.slow
def test_compiled_blocks_equal_those_that_are_not(references: Path, tmp_path: Path) -> None:
    """Every balance loss is on; each case compiles different code in a different order."""
    compiled = ("compile", True)
    cases = [
        Case(GLM4, 1, 2, 1, 2, 1, (compiled,)),
        Case("mixtral", 1, 2, 1, 1, 1, (compiled, ("recompute", "full"))),
        Case("gpt-oss", 1, 2, 1, 2, 1, (compiled, ("recompute", "selective"))),
        Case("llama4", 1, 1, 2, 1, 2, (compiled,)),
    ]
    assert_equal(cases, references, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [3, 6])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_on_every_odd_mesh(family: str, ranks: int, tmp_path: Path) -> None:
    train(tmp_path, [alone(ODD + family)], tmp_path)
    cases = all_meshes(ODD + family, ranks)
    train(tmp_path, cases, tmp_path)
    found = [error for case in cases for error in errors(case, tmp_path, tmp_path)]
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_on_every_mesh(
    family: str, ranks: int, references: Path, tmp_path: Path
) -> None:
    # there are 60 of 16 ranks per family
    cases = all_meshes(family, ranks) if ranks <= 8 else pairwise(MANY + family, ranks)
    assert_equal(cases, references, tmp_path)

"""N ranks equal one process: loss, gradient norm, every gradient, weights after three steps.

Tolerance: 1e-5 of each tensor's norm in fp32 with SGD, 1e-9 in fp64 with AdamW; sums over ranks are
taken in another order, which costs about 1e-7 and 1e-16. Routing must agree exactly; the seed is
one with which no choice of an expert hangs on the last digits.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.models.families import FAMILIES
from tests.parallel.meshes import ODD, Case, all_meshes, alone, hard_meshes, pairwise, thirds
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
DISPATCHED = [
    Case(GLM4, 1, 2, 2, 4, 1, (), (("kind", "hierarchical"), ("node_size", 2))),
    Case(GLM4, 1, 2, 2, 4, 1, (("recompute", "full"),), (("chunks", 3),)),
    Case(GLM4, 1, 2, 2, 2, 2, (), (("kind", "sync_free"), ("capacity_factor", 2.0))),
    Case(GLM4, 1, 4, 1, 4, 1, (("recompute", "full"),),
         (("kind", "sync_free"), ("capacity_factor", 0.5))),
]  # fmt: skip
HARD = [case for family in FAMILIES if family != GLM4 for case in hard_meshes(family)]
# the last block's weights that nothing divides are gathered when it runs again, not in forward
GATHERED_AGAIN = Case("llama4", 1, 1, 2, 1, 2, (("recompute", "selective"),))
ODD_FAMILIES = [ODD + family for family in (GLM4, "deepseek-v3", "gpt-oss", "llama4")]
CASES = {
    2: [*all_meshes(GLM4, 2), GATHERED_AGAIN],
    3: all_meshes(ODD + GLM4, 3),
    4: all_meshes(GLM4, 4) + HARD + RECOMPUTED + DISPATCHED,
    # each family has another of them, the first has all pairs of axes
    6: pairwise(ODD + GLM4, 6) + [thirds(family)[i] for i, family in enumerate(ODD_FAMILIES)],
    8: pairwise(GLM4, 8),
}
FAULTY = {
    Case("gpt-oss", 1, 1, 2, 2, 1, fault="expert gradient / ep"): "grad/layers.3.ffn.experts.w13",
    Case("gpt-oss", 1, 1, 2, 1, 1, fault="router not reduced over tp"): (
        "grad/layers.3.ffn.router.weight"
    ),
    Case("gpt-oss", 1, 1, 2, 1, 1, fault="norm not reduced over tp"): (
        "grad/layers.3.attention_norm.weight"
    ),
    Case("gpt-oss", 1, 1, 2, 1, 2, fault="down bias twice"): "grad/layers.3.ffn.experts.w2",
    Case("gpt-oss", 1, 2, 1, 1, 1, fault="mean of means"): "curve",
    Case("gpt-oss", 1, 1, 2, 2, 1, fault="repeated shard"): "grad/layers.3.ffn.experts.w13",
}
"""Where an injected fault must show, beside wherever else it does."""


def train(folder: Path, cases: Iterable[Case], references: Path, double: bool = False) -> None:
    """Run all cases, which have the same number of ranks, in one start of those ranks.

    One process chooses a seed, and its results are the reference; more ranks take that seed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cases, listed = list(cases), []
    for case in cases:
        settings = case.settings()
        if case.world > 1:
            seed = references / f"{alone(case.family).name}.seed"
            settings["run"]["seed"] = int(seed.read_text())
        listed.append({"name": case.name, "settings": settings, "fault": case.fault})
    (folder / "cases.json").write_text(json.dumps(listed))
    more = ["--double"] if double else []
    script = "tests/parallel/mesh_run.py"
    run(script, folder, folder / "cases.json", *more, ranks=cases[0].world, timeout=3600)


def errors(case: Case, ours: Path, references: Path, tolerance: float = 1e-5) -> list[str]:
    """Every tensor that differs from the reference by more than the tolerance."""
    got = load_file(ours / f"{case.name}.safetensors")
    expected = load_file(references / f"{alone(case.family).name}.safetensors")
    assert got.keys() == expected.keys()
    found = []
    for name, right in expected.items():
        difference = (got[name].double() - right.double()).norm()
        error = float(difference / right.double().norm().clamp(min=1e-30))
        if not error <= (0.0 if name.startswith("counts/") else tolerance):
            found.append(f"{case.name}: {name}: {error:.1e}")
    return found


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every family trained by one process."""
    folder = tmp_path_factory.mktemp("one")
    train(folder, map(alone, [*FAMILIES, *ODD_FAMILIES]), folder)
    return folder


@pytest.mark.parametrize("ranks", CASES)
def test_many_ranks_equal_one_process(ranks: int, references: Path, tmp_path: Path) -> None:
    train(tmp_path, CASES[ranks], references)
    found = [error for case in CASES[ranks] for error in errors(case, tmp_path, references)]
    assert not found, "\n".join(found)


def test_adamw_in_double_precision(tmp_path: Path) -> None:
    cases = [Case(GLM4, 1, 2, 2, 2, 2), Case(GLM4, 2, 1, 2, 2, 1), Case("gpt-oss", 1, 2, 2, 2, 2)]
    no_decay = Case("gpt-oss", 1, 2, 2, 4, 1, fault="experts without decay")
    train(tmp_path, [alone(GLM4), alone("gpt-oss")], tmp_path, double=True)
    train(tmp_path, [*cases, no_decay], tmp_path, double=True)
    found = [error for case in cases for error in errors(case, tmp_path, tmp_path, 1e-9)]
    assert not found, "\n".join(found)
    plain = [e for e in errors(no_decay, tmp_path, tmp_path, 0.1) if ": weight/" in e]
    assert plain and all(".experts.w" in error for error in plain), plain


def test_the_harness_sees_faults(references: Path, tmp_path: Path) -> None:
    train(tmp_path, FAULTY, references)
    for case, where in FAULTY.items():
        found = errors(case, tmp_path, references)
        assert any(f": {where}: " in error for error in found), (case.name, found[:5])


@pytest.mark.slow
def test_compiled_blocks_equal_those_that_are_not(references: Path, tmp_path: Path) -> None:
    """Every balance loss is on; each case is another order of compiled and other code."""
    compiled = ("compile", True)
    cases = [
        Case(GLM4, 1, 2, 1, 2, 1, (compiled,)),
        Case("mixtral", 1, 2, 1, 1, 1, (compiled, ("recompute", "full"))),
        Case("gpt-oss", 1, 2, 1, 2, 1, (compiled, ("recompute", "selective"))),
        Case("llama4", 1, 1, 2, 1, 2, (compiled,)),
    ]
    train(tmp_path, cases, references)
    found = [error for case in cases for error in errors(case, tmp_path, references)]
    assert not found, "\n".join(found)


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
    cases = all_meshes(family, ranks)
    train(tmp_path, cases, references)
    found = [error for case in cases for error in errors(case, tmp_path, references)]
    assert not found, "\n".join(found)

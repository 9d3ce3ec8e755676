"""Every recomputation policy with every dispatcher trains like one process.

Two microbatches a step; with limited capacity, the first pass of a step is discarded and repeated.
For tolerances see `test_mesh_equality.py`, whose harness this uses.
"""

from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.mesh.meshes import Case
from tests.parallel.mesh.test_mesh_equality import GLM4, assert_equal

Options = tuple[tuple[str, Any], ...]
KEPT = [k for n in range(4) for k in combinations(("attention", "matmul", "exchange"), n)]
SELECTIVE: list[Options] = [(("recompute", "selective"), ("recompute_keep", kept)) for kept in KEPT]
OTHERS: list[Options] = [
    (("recompute", "full"),),
    (("recompute", "full"), ("recompute_every", 2)),
    (("recompute", "selective"), ("recompute_every", 2)),
    (("recompute", "selective"), ("recompute_swiglu", True)),
    (("recompute_swiglu", True),),
]
REDONE: Options = (("kind", "sync_free"), ("capacity_factor", 0.3))
DISPATCHERS: list[Options] = [
    REDONE,
    (("kind", "sync_free"),),
    (("kind", "sync_free"), ("capacity_factor", 0.7), ("chunks", 3)),
    (("kind", "hierarchical"), ("node_size", 1), ("chunks", 2)),
    (("chunks", 3),),
    (),
]
# a repeated pass and two levels, in chunks, keeping everything and nothing; test_mesh_equality.py
# has the other dispatchers, full recomputation, what is kept by default, and SwiGLU
FEW = [
    (SELECTIVE[7], DISPATCHERS[2]),
    ((*SELECTIVE[0], ("recompute_every", 2)), DISPATCHERS[3]),
]  # fmt: skip
ALL = list(product(SELECTIVE + OTHERS, DISPATCHERS))


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "pairs"),
    [
        pytest.param("glm4", FEW, id="few"),
        pytest.param(GLM4, ALL, marks=pytest.mark.slow, id="all, with MTP"),
    ],
)
def test_recomputation_with_every_dispatcher(
    family: str, pairs: list[tuple[Options, Options]], tmp_path: Path
) -> None:
    cases = [Case(family, 1, 2, 1, 2, 1, policy, dispatch) for policy, dispatch in pairs]
    assert_equal(cases, tmp_path / "alone", tmp_path)

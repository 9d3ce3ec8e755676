"""Every recomputation policy with every dispatcher trains like one process.

Two microbatches a step; with limited capacity, the first pass of a step is discarded and repeated.
For tolerances see `test_mesh_equality.py`, whose harness this uses.
"""

from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.mesh.meshes import Case, alone
from tests.parallel.mesh.test_mesh_equality import GLM4, errors, train

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
# each dispatcher once, keeping nothing, the default and everything
FEW = [
    (SELECTIVE[0], REDONE), (SELECTIVE[4], REDONE), (SELECTIVE[7], DISPATCHERS[2]),
    (OTHERS[0], DISPATCHERS[1]), (OTHERS[2], DISPATCHERS[3]), (OTHERS[3], DISPATCHERS[4]),
]  # fmt: skip
ALL = list(product(SELECTIVE + OTHERS, DISPATCHERS))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    train(folder, [alone(GLM4)], folder)
    return folder


@pytest.mark.long
@pytest.mark.parametrize(
    "pairs", [FEW[:2], FEW[2:4], FEW[4:], pytest.param(ALL, marks=pytest.mark.slow)],
    ids=["redone", "sync_free", "others", "all"],
)  # fmt: skip
def test_recomputation_with_every_dispatcher(
    pairs: list[tuple[Options, Options]], reference: Path, tmp_path: Path
) -> None:
    cases = [Case(GLM4, 1, 2, 1, 2, 1, policy, dispatch) for policy, dispatch in pairs]
    train(tmp_path, cases, reference)
    found = [error for case in cases for error in errors(case, tmp_path, reference)]
    assert not found, "\n".join(found)

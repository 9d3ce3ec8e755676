"""Every way to recompute with every dispatcher trains as one process does.

Two microbatches a step; where room is short, the first pass of a step is thrown away and redone.
Tolerance: `test_mesh_equality.py`, whose harness this uses.
"""

from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.meshes import Case, alone
from tests.parallel.test_mesh_equality import GLM4, errors, train

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
# keeping nothing, all, and what is kept by default meet every dispatcher, the others one
FEW = [(policy, REDONE) for policy in SELECTIVE + OTHERS] + [
    (policy, dispatch) for policy in (SELECTIVE[0], SELECTIVE[4], SELECTIVE[7])
    for dispatch in DISPATCHERS[1:]
]  # fmt: skip
ALL = list(product(SELECTIVE + OTHERS, DISPATCHERS))


@pytest.mark.parametrize("pairs", [FEW, pytest.param(ALL, marks=pytest.mark.slow)], ids=len)
def test_recomputation_with_every_dispatcher(
    pairs: list[tuple[Options, Options]], tmp_path: Path
) -> None:
    train(tmp_path, [alone(GLM4)], tmp_path)
    cases = [Case(GLM4, 1, 2, 1, 2, 1, policy, dispatch) for policy, dispatch in pairs]
    train(tmp_path, cases, tmp_path)
    found = [error for case in cases for error in errors(case, tmp_path, tmp_path)]
    assert not found, "\n".join(found)

"""N ranks equal one process: loss, gradient norm, every gradient, weights after three steps.

Tolerance: 1e-5 of each tensor's norm, in fp32; sums over ranks are taken in another order, which
costs about 1e-7. Routing must agree exactly.
"""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.runs import TINY, run

GLOBAL_BATCH, PASSES = 16, 2
MESHES: dict[int, dict[str, list[str]]] = {
    2: {
        "ep2": ["--parallel.ep=2"],
        "dp_shard2": ["--parallel.ep=1"],
        "dp_replicate2": ["--parallel.ep=1", "--parallel.dp_replicate=2"],
        "ep2-no-reshard": ["--parallel.ep=2", "--parallel.reshard_after_forward=false"],
    },
    4: {
        "ep4": ["--parallel.ep=4"],
        "efsdp2-ep2": ["--parallel.ep=2"],
        "dp_replicate2-ep2": ["--parallel.ep=2", "--parallel.dp_replicate=2"],
        "one-expert-per-pair": ["--parallel.ep=2", "--model.moe.n_experts=2"],
        "uneven-experts": ["--parallel.ep=1", "--model.moe.n_experts=6"],
    },
    8: {
        "dp_replicate2-efsdp2-ep2": ["--parallel.ep=2", "--parallel.dp_replicate=2"],
        "efsdp4-ep2": ["--parallel.ep=2"],
        "ep8": ["--parallel.ep=8"],
    },
}
MODELS: dict[str, list[str]] = {
    "plain": [],
    "one-expert-per-pair": ["--model.moe.n_experts=2"],
    "uneven-experts": ["--model.moe.n_experts=6"],
}


def with_batch(ranks: int, options: list[str]) -> list[str]:
    micro_batch = GLOBAL_BATCH // PASSES // ranks
    return [
        *options, f"--train.global_batch={GLOBAL_BATCH}", f"--train.micro_batch={micro_batch}"
    ]  # fmt: skip


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    settings = {name: with_batch(1, options) for name, options in MODELS.items()}
    run("tests/parallel/mesh_run.py", folder, TINY, json.dumps(settings))
    return folder


@pytest.mark.parametrize("ranks", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_many_ranks_equal_one_process(ranks: int, one_process: Path, tmp_path: Path) -> None:
    settings = {name: with_batch(ranks, options) for name, options in MESHES[ranks].items()}
    run("tests/parallel/mesh_run.py", tmp_path, TINY, json.dumps(settings), ranks=ranks)
    faults = []
    for mesh in settings:
        ours = load_file(tmp_path / f"{mesh}.safetensors")
        model = mesh if mesh in MODELS else "plain"
        reference = load_file(one_process / f"{model}.safetensors")
        assert ours.keys() == reference.keys()
        for name, expected in reference.items():
            got, expected = ours[name].double(), expected.double()
            error = float((got - expected).norm() / expected.norm().clamp(min=1e-30))
            tolerance = 0.0 if name.startswith("counts/") else 1e-5
            if not error <= tolerance:
                faults.append(f"{mesh}: {name}: {error:.1e}")
    assert not faults, "\n".join(faults)

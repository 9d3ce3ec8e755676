"""Three runs of one experiment give the same bits: weights, optimizer, losses, metrics, loads.

The experiment has MTP, expert groups, every auxiliary loss and a balancing bias.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.runs import ROOT, run
from tests.train.in_process import run_train
from train.report.metrics import EXPERT_LOAD, METRICS, read_lines

TIMES = {"tokens_per_s", "step_s", "data_share", "memory_gib"}
EXPERIMENT = ROOT / "configs" / "tiny" / "deepseek_v3.toml"
OPTIONS = [
    "--model.vocab_size=320", "--train.steps=4", "--train.global_batch=8", "--train.micro_batch=2",
    "--validation.sequences=8", "--model.moe.global_aux_loss_coef=0.01",
    "--model.moe.router_z_loss_coef=0.001",
]  # fmt: skip


def outcome(folder: Path) -> dict[str, Any]:
    """Every output file of a run, without times."""
    metrics = [
        {name: value for name, value in record.items() if name not in TIMES}
        for record in read_lines(folder / METRICS)
    ]
    shards = sorted((folder / "checkpoints").rglob("*.safetensors"))
    assert len(metrics) == 4 and shards and "validation_loss" in metrics[-1]
    return {
        "metrics": metrics,
        "load": read_lines(folder / EXPERT_LOAD),
        **{str(path.relative_to(folder)): path.read_bytes() for path in shards},
    }


@pytest.mark.determinism
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_three_runs_are_the_same_bits(ranks: int, overrides: list[str], tmp_path: Path) -> None:
    outcomes = []
    for i in range(3):
        folder = tmp_path / f"run-{i}"
        rest = [option for option in overrides if not option.startswith("--run.dir")]
        run("-m", "train", EXPERIMENT, *OPTIONS, *rest, f"--run.dir={folder}", ranks=ranks)
        outcomes.append(outcome(folder))
    for other in outcomes[1:]:
        assert other.keys() == outcomes[0].keys()
        different = [name for name in other if other[name] != outcomes[0][name]]
        assert not different


@pytest.fixture
def restored() -> Iterator[None]:
    """Restores torch's settings, which are those of the whole process."""
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    sdp = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    with mock.patch.dict(os.environ):
        yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
    torch.backends.cuda.enable_cudnn_sdp(sdp[0])
    torch.backends.cuda.enable_mem_efficient_sdp(sdp[1])


def test_deterministic_algorithms_change_no_bit_on_a_cpu(
    overrides: list[str], tmp_path: Path, restored: None
) -> None:
    rest = [option for option in overrides if not option.startswith("--run.dir")]
    words = [EXPERIMENT, *OPTIONS, "--train.micro_batch=4", *rest]
    for setting in ("false", "true"):
        run_train(*words, f"--run.dir={tmp_path / setting}", f"--train.deterministic={setting}")
    assert torch.are_deterministic_algorithms_enabled()
    assert outcome(tmp_path / "false") == outcome(tmp_path / "true")

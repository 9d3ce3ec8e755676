"""A run continues on 2, 4, 1 and 3 ranks, with other tensor and expert parallelism each time: the
same tokens in every step, and the losses of a run that never changed."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.runs import TINY, run
from tests.train.in_process import run_train
from train.checkpoint import checkpoint
from train.data.batches import shuffled_epochs
from train.dataset.sequences import sequences_of
from train.report.metrics import read_lines

PLACES = [
    (2, ["--parallel.ep=2"]),
    (4, ["--parallel.tp=2", "--parallel.ep=2"]),
    (1, []),
    (3, ["--parallel.ep=3"]),
    (4, ["--parallel.ep=4", "--parallel.dp_replicate=1"]),
]
FEW = [(2, ["--parallel.tp=2", "--parallel.ep=2"]), (1, [])]
"""By default; `test_resume_on_another_mesh` goes from 1 rank to 2, and
`test_one_mesh_resumes_what_another_saved` from 4 to other meshes of 4 and 1."""
EACH = 2
"""Steps on each number of ranks."""


def losses(folder: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_lines(folder / "metrics.jsonl")}


@pytest.mark.long
@pytest.mark.parametrize(
    "places", [FEW, pytest.param(PLACES, marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_losses_do_not_depend_on_the_ranks(
    places: list[tuple[int, list[str]]], overrides: list[str], tmp_path: Path
) -> None:
    n, micro_batch = len(places), 3 if places is FEW else 1  # three ranks need one
    words = [TINY, *overrides, "--train.global_batch=12", f"--train.micro_batch={micro_batch}"]
    words += ["--model.moe.n_experts=12", f"--schedule.steps={n * EACH}", "--checkpoint.every=2"]
    whole = tmp_path / "whole"
    in_step = "--checkpoint.async_save=false"
    run_train(*words, in_step, f"--run.dir={whole}", f"--train.steps={n * EACH}")
    for i, (ranks, mesh) in enumerate(places):
        here = [*words, *mesh, f"--train.steps={(i + 1) * EACH}"]
        done = run_train(*here) if ranks == 1 else run("-m", "train", *here, ranks=ranks)
        out = done.stdout
        assert re.search(f"^.*: {ranks} ranks", out, re.M)
        assert not i or f"step-{i * EACH:08d}\n" in out, "resumed from the last step"
    one, other = losses(tmp_path / "run"), losses(whole)
    largest = max(abs(one[step] / other[step] - 1) for step in other)
    print(f"{n * EACH} steps on {[ranks for ranks, _ in places]} ranks: largest relative "
          f"difference of a loss {largest:.1e}")  # fmt: skip
    assert one.keys() == other.keys() and largest <= 1e-5
    manifests = [
        checkpoint.read_manifest(checkpoint.find(folder)) for folder in (tmp_path / "run", whole)
    ]
    for name in manifests[0].boxes:
        first, second = (checkpoint.Reader(manifest) for manifest in manifests)
        box = first.whole(name)
        torch.testing.assert_close(
            first.read(name, box), second.read(name, box), rtol=2e-3, atol=2e-5
        )


def test_the_tokens_of_a_step_are_the_same_on_any_number_of_ranks() -> None:
    sequences = sequences_of(np.arange(4_001), 16, eot=0)

    def tokens(step: int, n_ranks: int) -> np.ndarray:
        found = []
        for rank in range(n_ranks):
            data = shuffled_epochs(
                sequences, seed=3, global_batch=12, micro_batch=1, rank=rank, n_ranks=n_ranks
            )
            found += [batch.tokens_T.numpy().reshape(-1, 16) for batch in data.step(step)]
        rows = np.concatenate(found)
        return rows[rows[:, 0].argsort()]

    for step in (1, 2, 25, 26, 60):  # within several epochs
        expected = tokens(step, 1)
        assert expected.shape == (12, 16)
        for n_ranks in (2, 3, 4):
            assert np.array_equal(tokens(step, n_ranks), expected)

"""Training steps with every dispatcher on the started number of ranks.

Started as `torchrun ... dispatch_training_run.py FILE.json EP`. FILE maps the name of each setting
to its largest difference from all-to-all (relative to a tensor's norm), its first step's fields
and, if the run was stopped, the message and whether any state had changed by then.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.loader import load
from configs.schema import JobConfig
from models.decoder import Decoder
from models.router import routers
from parallel.dispatch.overflow import CapacityOverflow
from parallel.ranks import Ranks, gather_json, start_ranks, stop_ranks
from parallel.shards import local_of
from tests.parallel.mesh.mesh_run import Recording, random_corpus, training_of, wholes
from tests.runs import TINY
from train.data.batches import TrainingData, shuffled_epochs
from train.dataset.sequences import sequences_of
from train.step import train_step

TIGHT = ["--parallel.dispatch.kind=sync_free", "--parallel.dispatch.capacity_factor=0.3"]
ROOMY = ["--parallel.dispatch.kind=sync_free", "--parallel.dispatch.capacity_factor=4"]
STEPS = {"all_to_all": 2, "fp8": 2, "sync_free-redone": 2}
"""Of the others one: `test_mesh_equality.py` compares two of theirs with one process."""


def settings(ep: int) -> dict[str, list[str]]:
    """Overrides of every setting; the others are compared with the first."""
    return {
        "all_to_all": [],
        "fp8": [
            "--parallel.dispatch.dispatch_dtype=fp8", "--parallel.dispatch.combine_grad_dtype=fp8"
        ],
        "overlapped": ["--parallel.dispatch.chunks=3"],
        "sync_free": ROOMY,
        "sync_free-redone": TIGHT,
        "sync_free-stopped": [*TIGHT, "--parallel.dispatch.on_overflow=stop"],
        "hierarchical": [
            "--parallel.dispatch.kind=hierarchical", "--parallel.dispatch.chunks=2",
            f"--parallel.dispatch.node_size={ep // 2}",
        ],
    }  # fmt: skip


def start(config: JobConfig, ranks: Ranks) -> tuple[Decoder, TrainingData]:
    training = training_of(config, ranks)
    data = shuffled_epochs(
        sequences_of(random_corpus(config.model.vocab_size, 20_000), config.data.seq_len, 0),
        seed=config.run.seed,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        rank=ranks.rank,
        n_ranks=training.mesh.parallel_dims.data_ranks,
    )
    return training.model, data


def train(config: JobConfig, ranks: Ranks, steps: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Gradients of the first step; weights, counts and curve of all; further information to
    report."""
    model, data = start(config, ranks)
    tensors: dict[str, Tensor] = {}
    told: dict[str, Any] = {}
    optimizer = Recording(model, 0.1, tensors)
    before = {name: local_of(p).clone() for name, p in model.named_parameters()}
    for step in range(1, steps + 1):
        try:
            done = train_step(
                model, optimizer, data.step(step), step=step, rank=ranks.rank, clip_norm=1.0,
                mtp_weight=0.3,
            )  # fmt: skip
        except CapacityOverflow as error:
            after = dict(model.named_parameters())
            same = all(torch.equal(local_of(after[name]), before[name]) for name in before)
            bias = max(float(router.bias_E.abs().max()) for router in routers(model))
            changed = any(gather_json(not same or bias > 0))
            return {}, {"stopped": str(error), "changed": changed}
        assert done is not None
        told.setdefault("fields", done.dispatch)
        tensors[f"counts/{step}"] = done.counts_LE
        tensors[f"curve/{step}"] = torch.tensor([done.loss, done.grad_norm], dtype=torch.float64)
        tensors |= wholes({f"weight/{step}/{name}": p for name, p in model.named_parameters()})
        for i, router in enumerate(routers(model)):
            tensors[f"bias/{step}/{i}"] = router.bias_E.clone()
    return tensors, told


def main(out: Path, ep: int) -> None:
    ranks = start_ranks(threads=1)
    common = [f"--parallel.ep={ep}", "--train.global_batch=16"]
    common += [f"--train.micro_batch={8 // ranks.world}"]
    results: dict[str, Any] = {}
    expected: dict[str, Tensor] = {}
    for name, options in settings(ep).items():
        steps = STEPS.get(name, 1)
        tensors, told = train(load(TINY, [*common, *options]), ranks, steps)
        expected = expected or tensors
        if tensors:
            assert tensors.keys() == {n for n in expected if steps == 2 or "/2" not in n}
            told["difference"] = max(
                float((t.double() - e.double()).norm() / e.double().norm().clamp(1e-30))
                for t, e in ((t, expected[n]) for n, t in tensors.items())
            )
        results[name] = told
    if ranks.is_first:
        out.write_text(json.dumps(results))
    stop_ranks()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

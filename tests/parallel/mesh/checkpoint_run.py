"""Trains a step on a mesh and saves, or loads the checkpoint of another mesh; then trains one more
step.

`[torchrun] checkpoint_run.py FOLDER CASES.json`. Each case writes `FOLDER/NAME.safetensors`: the
whole state before the second step, and the loss, gradient norm and weights after it.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from configs.loader import flatten, from_dict
from parallel.ranks import Ranks, start_ranks, stop_ranks
from tests.parallel.mesh.mesh_run import random_corpus, shake, training_of, wholes
from train.checkpoint import checkpoint
from train.data.batches import shuffled_epochs
from train.dataset.sequences import sequences_of
from train.optim.optimizer import optimizer_tensors
from train.step import StepResult, train_step


class Run:
    """A model and its optimizer on one mesh."""

    def __init__(
        self,
        settings: dict[str, Any],
        name: str,
        ranks: Ranks,
        compute: torch.dtype = torch.float32,
    ) -> None:
        self.config, self.ranks = from_dict(settings, name), ranks
        training = training_of(self.config, ranks, compute)
        self.mesh, self.model, self.optimizer = training.mesh, training.model, training.optimizer
        self.fp8_weights, self.accumulation = training.fp8_weights, training.accumulation
        shake(self.model)
        self.fp8_weights.refresh()
        self.data = shuffled_epochs(
            sequences_of(random_corpus(self.config.model.vocab_size, 20_000), 32, 0),
            seed=0,
            global_batch=self.config.train.global_batch,
            micro_batch=self.config.train.micro_batch,
            rank=self.mesh.parallel_dims.data_rank(ranks.rank),
            n_ranks=self.mesh.parallel_dims.data_ranks,
        )

    def step(self, step: int, updated: Callable[[], None] | None = None) -> StepResult:
        """updated: called after the step, instead of quantizing the weights again."""
        done = train_step(
            self.model, self.optimizer, self.data.step(step), step=step, rank=self.ranks.rank,
            tp_size=self.mesh.parallel_dims.tp, clip_norm=1.0, mtp_weight=0.3,
            updated=updated or self.fp8_weights.refresh, accumulation=self.accumulation,
        )  # fmt: skip
        assert done is not None
        return done

    def state(self) -> dict[str, torch.Tensor]:
        """The live tensors, as the trainer saves them."""
        weights = self.model.state_dict(keep_vars=True)
        state = {f"model.{name}": tensor for name, tensor in weights.items()}
        moments = optimizer_tensors(self.optimizer)
        return state | {f"optimizer.{name}": tensor for name, tensor in moments.items()}


def run_case(folder: Path, case: dict[str, Any], ranks: Ranks) -> None:
    run = Run(case["settings"], case["name"], ranks)
    if case["load"]:
        manifest = checkpoint.read_manifest(checkpoint.find(folder / case["load"]))
        checkpoint.load(manifest, run.state())
    else:
        run.step(1)
        root, facts = folder / case["name"], {"step": 1}
        checkpoint.save(root, run.state(), facts, flatten(run.config), None, ranks)
    record = wholes({f"before/{name}": tensor for name, tensor in run.state().items()})
    done = run.step(2)
    record["curve"] = torch.tensor([done.loss, done.grad_norm])
    record |= wholes({f"after/{name}": p for name, p in run.model.named_parameters()})
    if ranks.is_first:
        save_file(record, folder / f"{case['name']}.safetensors")


if __name__ == "__main__":
    the_ranks = start_ranks(threads=1)
    for one in json.loads(Path(sys.argv[2]).read_text()):
        run_case(Path(sys.argv[1]), one, the_ranks)
    stop_ranks()

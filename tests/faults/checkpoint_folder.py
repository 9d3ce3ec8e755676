"""A folder of checkpoints without a run, and its restart: for tests that damage files."""

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.loader import flatten, from_dict
from configs.schema import JobConfig
from models.layers.box import Box
from parallel.ranks import Ranks
from tests.runs import TINY
from train.checkpoint import checkpoint
from train.checkpoint.resume import ResumeState, restore
from train.checkpoint.saving import part_of, write_part
from train.checkpoint.storage.local import LocalStorage

FACTS = {"corpus": "fingerprint", "compute": "torch.float32"}


class CheckpointFolder:
    """Checkpoints of a run in `folder`, each of two ranks; the state of step n is known."""

    def __init__(self, folder: Path) -> None:
        settings = tomllib.loads(TINY.read_text())
        config = from_dict(settings, str(TINY))
        self.config: JobConfig = replace(config, run=replace(config.run, dir=str(folder)))
        self.root = folder / "checkpoints"
        self.storage = LocalStorage(self.root)

    def state(self, step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        return {
            "model.a": torch.randn(6, 5, generator=generator),
            "model.b": torch.randn(40, generator=generator).bfloat16(),
            "optimizer.a.exp_avg": torch.randn(6, 5, generator=generator),
        }

    def write(self, step: int, **state: Any) -> Path:
        """Write the checkpoint of a step, every tensor divided between the files of two ranks."""
        name = f"step-{step:08d}"
        partial = self.storage.begin(name, 0)
        reports = []
        for rank in range(2):
            boxes, tensors = {}, {}
            for key, whole in self.state(step).items():
                rows = whole.chunk(2)
                offset = (rank * rows[0].shape[0], *[0] * (whole.dim() - 1))
                boxes[key] = Box(tuple(whole.shape), offset, tuple(rows[rank].shape)), whole.dtype
                tensors[key] = rows[rank]
            part = part_of(f"rank-{rank:05d}.safetensors", boxes)
            reports.append(write_part(self.storage, partial, part, tensors))
        facts = {"step": step, "owes_validation": False, **FACTS, **state}
        self.storage.commit_parts(reports, partial, name, facts, flatten(self.config))
        return self.root / name

    def restart(self, ranks: Ranks) -> tuple[ResumeState, dict[str, Tensor]]:
        """What a new attempt of the run starts from."""
        live = {name: torch.full_like(t, torch.nan) for name, t in self.state(0).items()}
        weights = {name: t for name, t in live.items() if name.startswith("model.")}
        moments = {name: t for name, t in live.items() if name not in weights}
        state = restore(self.config, self.storage, ranks, FACTS, lambda: weights, lambda: moments)
        return state, live

    def is_state(self, live: dict[str, Tensor], step: int) -> bool:
        return all(torch.equal(live[name], t) for name, t in self.state(step).items())

    def steps(self) -> list[int]:
        return [int(path.name[5:]) for path in checkpoint.checkpoints(self.root)]

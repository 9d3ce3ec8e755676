"""Training runs on whatever ranks this is started with; losses, gradients and weights go to files.

Started by the tests as `torchrun ... mesh_run.py FOLDER FILE.toml JSON`, or alone as one process.
JSON maps a name to a list of overrides; each becomes `FOLDER/NAME.safetensors`. Plain SGD, so that
a gradient off by a constant factor shows in the weights (AdamW would hide it). Tokens are random,
documents of unequal length.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from configs.degrees import resolve
from configs.loader import load
from configs.schema import RunConfig
from models.decoder import Decoder
from models.router import routers
from parallel import mesh as meshes
from parallel.apply import materialise, parallelize
from parallel.ranks import Ranks, start_ranks, stop_ranks
from train.batches import Sequences, TrainingData
from train.step import train_step

STEPS = 3


def random_corpus(vocab_size: int, length: int) -> np.ndarray:
    """Tokens with a skewed distribution; token 0 opens documents of 1 to 40 tokens."""
    rng = np.random.default_rng(7)
    tokens = 1 + rng.zipf(1.5, length) % (vocab_size - 1)
    tokens[np.minimum(rng.integers(1, 41, length).cumsum(), length - 1)] = 0
    tokens[0] = 0
    return tokens.astype(np.uint16)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone().contiguous()


class RecordingSgd:
    """SGD that keeps the gradients it was given, whole, of the first step."""

    def __init__(self, model: nn.Module, lr: float, record: dict[str, torch.Tensor]) -> None:
        self.model, self.record = model, record
        self.inner = torch.optim.SGD(model.parameters(), lr=lr, foreach=False)

    def step(self) -> None:
        if not self.record:
            for name, parameter in self.model.named_parameters():
                assert parameter.grad is not None, name
                self.record[f"grad/{name}"] = whole(parameter.grad)
        self.inner.step()

    def zero_grad(self) -> None:
        self.inner.zero_grad()


def train(out: Path, config: RunConfig, ranks: Ranks) -> None:
    """STEPS steps of one experiment; rank 0 writes `out`."""
    mesh = meshes.build(resolve(config, ranks.world), ranks.device.type)
    with torch.device("meta"):
        model = Decoder(config.model)
    parallelize(model, mesh, config, torch.float32)
    materialise(model, config.model, config.run.seed, ranks.device)
    data = TrainingData(
        Sequences(random_corpus(config.model.vocab_size, 20_000), config.data.seq_len, 0),
        seed=config.run.seed,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        rank=ranks.rank,
        n_ranks=mesh.degrees.data_ranks,
    )
    result: dict[str, torch.Tensor] = {}
    optimizer = RecordingSgd(model, 0.1, result)
    curve = []
    for step in range(1, STEPS + 1):
        done = train_step(
            model, optimizer, data.step(step), step=step, rank=ranks.rank, clip_norm=1.0
        )
        assert done is not None
        curve.append([done.loss, done.grad_norm])
        result[f"counts/{step}"] = done.counts_LE.contiguous()
    result["curve"] = torch.tensor(curve, dtype=torch.float64)
    for name, parameter in model.named_parameters():
        result[f"weight/{name}"] = whole(parameter)
    for i, router in enumerate(routers(model)):
        result[f"bias/{i}"] = router.bias_E.clone()
    if ranks.is_first:
        save_file(result, out)


def main(folder: Path, file: str, meshes_to_run: dict[str, list[str]]) -> None:
    ranks = start_ranks(threads=1)
    for name, overrides in meshes_to_run.items():
        train(folder / f"{name}.safetensors", load(file, overrides), ranks)
    stop_ranks()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))

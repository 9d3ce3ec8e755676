"""Training runs on the started number of ranks; losses, gradients and weights are written to files.

Started by the tests as `torchrun ... mesh_run.py FOLDER CASES.json [--double]`, or without torchrun
as one process. Each case writes `FOLDER/NAME.safetensors`. In fp32 the optimizer is plain SGD, so
that a gradient with a wrong constant factor changes the weights (AdamW would hide it). AdamW itself
divides by noise in fp32; `--double` runs it with every fp32 of the program replaced by fp64. Tokens
are random, documents have unequal lengths.
"""

import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

if __name__ == "__main__" and "--double" in sys.argv:
    torch.set_default_dtype(torch.float64)
    torch.float32 = torch.float64
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]

import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

import kernels.moe.router
import models.balance
from configs.loader import from_dict
from configs.schema import JobConfig, OptimizerConfig
from kernels.layers.cross_entropy import IGNORE
from models.decoder import Decoder
from models.router import routers
from parallel import mesh as meshes
from parallel.ranks import Ranks, gather_json, start_ranks, stop_ranks
from parallel.shards import box_of, local_of
from tests.parallel.mesh.faults import FAULTS
from train.build import Training, build_training, shard_model
from train.data.batches import Batch, shuffled_epochs
from train.dataset.sequences import sequences_of
from train.optim.optimizer import build_optimizer
from train.step import train_step


def random_corpus(vocab_size: int, length: int) -> np.ndarray:
    """Tokens with a skewed distribution; token 0 starts documents of 1 to 40 tokens."""
    rng = np.random.default_rng(7)
    tokens = 1 + rng.zipf(1.5, length) % (vocab_size - 1)
    tokens[np.minimum(rng.integers(1, 41, length).cumsum(), length - 1)] = 0
    tokens[0] = 0
    return tokens.astype(np.uint16)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that ranks divide, assembled on every rank; of replicas that of the first rank."""
    return wholes({"": tensor})[""]


def wholes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same of many tensors, in one exchange of their places and one of their bytes.

    `DTensor.full_tensor` plans this by a search through placements, which took a rank of eight four
    fifths of its time; test_mesh_equality.py compares the two (`WHOLE`).
    """
    local = {name: local_of(tensor).detach().contiguous() for name, tensor in tensors.items()}
    divided = [name for name, tensor in tensors.items() if isinstance(tensor, DTensor)]
    boxes = [box_of(tensors[name]) for name in divided]
    places = gather_json([(box.offset, box.shape) for box in boxes])
    sent = [torch.empty(0, dtype=torch.uint8)]
    sent += [local[name].flatten().view(torch.uint8) for name in divided]
    sizes = [
        [
            math.prod(shape) * local[name].itemsize
            for name, (_, shape) in zip(divided, of, strict=True)
        ]
        for of in places
    ]
    most = max(map(sum, sizes))
    mine = torch.nn.functional.pad(torch.cat(sent), (0, most - sum(map(len, sent))))
    every = [torch.empty_like(mine) for _ in places]
    dist.all_gather(every, mine)
    found = {name: tensor.clone() for name, tensor in local.items() if name not in divided}
    for name in divided:
        found[name] = local[name].new_full(tensors[name].shape, math.nan)
    for part, of, n_bytes in reversed(list(zip(every, places, sizes, strict=True))):
        pieces = part[: sum(n_bytes)].split(n_bytes)
        for name, (offset, shape), piece in zip(divided, of, pieces, strict=True):
            place = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
            # a copy, because the bytes of a tensor may begin anywhere
            found[name][place] = piece.clone().view(local[name].dtype).view(shape)
    return {name: found[name] for name in tensors}


def with_gaps(batch: Batch) -> Batch:
    """The batch without the targets of some tokens, so that microbatches have unequal weights."""
    targets_T = batch.targets_T.where(batch.tokens_T % 3 != 2, IGNORE)
    return replace(batch, targets_T=targets_T, n_targets=int((targets_T != IGNORE).sum()))


class Recording:
    """An optimizer that records the whole gradients of the first step.

    It works on this rank's parts as plain tensors: for an addition of DTensors on a mesh of four
    axes torch tries every placement, which took four of a case's five seconds.
    """

    def __init__(self, model: nn.Module, lr: float, record: dict[str, torch.Tensor]) -> None:
        self.model, self.lr, self.record = model, lr, record
        self.parts: dict[str, nn.Parameter] = {}

    def step(self) -> None:
        parameters = dict(self.model.named_parameters())
        if not self.record:
            self._start(parameters)
        for name, parameter in parameters.items():
            part = self.parts[name]
            assert parameter.grad is not None, name
            assert part.data_ptr() == local_of(parameter).data_ptr(), name
            part.grad = local_of(parameter.grad)
        self.inner.step()

    def _start(self, parameters: dict[str, nn.Parameter]) -> None:
        """Initialize after the first backward, because FSDP2 has its shards of the weights only
        then."""
        grads = {f"grad/{name}": p.grad for name, p in parameters.items() if p.grad is not None}
        assert len(grads) == len(parameters)
        self.record |= wholes(grads)
        for name, parameter in parameters.items():
            self.parts[name] = nn.Parameter(local_of(parameter).detach())
        if torch.get_default_dtype() == torch.float64:
            self.inner: Any = torch.optim.AdamW(self._groups(parameters), foreach=False)
        else:
            self.inner = torch.optim.SGD(self.parts.values(), lr=self.lr, foreach=False)

    def _groups(self, parameters: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
        """The parameter groups of `build_optimizer`. Every step removes a tenth of decayed
        parameters, so a missing decay is detected."""
        name_of = {parameter: name for name, parameter in parameters.items()}
        config = OptimizerConfig(lr=self.lr / 10, weight_decay=1 / self.lr)
        return [
            {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
            | {"params": [self.parts[name_of[parameter]] for parameter in group["params"]]}
            for group in build_optimizer(self.model, config).param_groups
        ]

    def zero_grad(self) -> None:
        self.model.zero_grad()


def shake(model: Decoder) -> None:
    """Give norms, biases and sinks distinct values, which they do not have initially."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name.endswith(("norm.weight", ".bias", ".b13", ".b2", ".sinks")):
                noise = torch.randn(parameter.shape, generator=generator) * 0.1
                assert isinstance(parameter, DTensor)
                parameter.to_local().add_(noise[box_of(parameter).slices()])
        for router in routers(model):
            router.bias_E.normal_(std=0.01, generator=generator)


_made = cache(meshes._mesh)


def training_of(config: JobConfig, ranks: Ranks, compute: torch.dtype = torch.float32) -> Training:
    """Build the training of an experiment; in one process, equal meshes share their groups.

    Every group has threads, one of which wakes all the time, and tests run many experiments in one
    start of the ranks: 56 of them took 340 s with separate groups, 145 s with shared ones.
    """
    with patch.object(meshes, "_mesh", _made):
        return build_training(config, ranks, shard_model(config, ranks, compute))


def train(
    out: Path, config: JobConfig, ranks: Ranks, fault: str, steps: int, whole: bool = False
) -> None:
    """Train so many steps of one experiment; rank 0 writes `out`.

    whole: compare `wholes` with torch's way, for one parameter of every kind, because that is slow.
    """
    training = training_of(config, ranks)
    model, mesh = training.model, training.mesh
    shake(model)
    data = shuffled_epochs(
        sequences_of(random_corpus(config.model.vocab_size, 20_000), config.data.seq_len, 0),
        seed=config.run.seed,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        rank=mesh.parallel_dims.data_rank(ranks.rank),
        n_ranks=mesh.parallel_dims.data_ranks,
    )
    result: dict[str, torch.Tensor] = {}  # `optimizer` also writes to it
    curve = []
    with FAULTS[fault](model, mesh):
        optimizer = Recording(model, config.optimizer.lr, result)
        for step in range(1, steps + 1):
            done = train_step(
                model, optimizer, map(with_gaps, data.step(step)), step=step, rank=ranks.rank,
                tp_size=mesh.parallel_dims.tp, clip_norm=1.0, mtp_weight=config.train.mtp_weight,
                z_loss_coef=config.train.z_loss_coef, accumulation=training.accumulation,
            )  # fmt: skip
            assert done is not None
            losses = [*done.mtp_losses, *done.router_losses.values()]
            curve.append([done.loss, done.grad_norm, *losses])
            result[f"counts/{step}"] = done.counts_LE.contiguous()
    result["curve"] = torch.tensor(curve, dtype=torch.float64)
    result |= wholes({f"weight/{name}": p for name, p in model.named_parameters()})
    kinds = {re.sub(r"\.\d+\.", ".", name): name for name, _ in model.named_parameters()}
    for name in kinds.values() if whole else ():
        parameter = model.get_parameter(name)
        assert isinstance(parameter, DTensor)
        assert torch.equal(result[f"weight/{name}"], parameter.full_tensor()), name
    for i, router in enumerate(routers(model)):
        result[f"bias/{i}"] = router.bias_E.clone()
    if ranks.is_first:
        save_file(result, out)


class Fragile(Exception):
    """Raised if two experts are so close that rounding decides between them."""


def steady(choice: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The choice, after checking that noise of a few fp32 roundings does not change it."""

    def checked(scores_TE: torch.Tensor, how: Any) -> torch.Tensor:
        made = choice(scores_TE, how)
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            noise = torch.rand(scores_TE.shape, generator=generator) - 0.5
            again = choice(scores_TE * (1 + 3e-6 * noise.to(scores_TE.dtype)), how)
            if not torch.equal(made.sort(-1).values, again.sort(-1).values):
                raise Fragile
        return made

    return checked


def train_steadily(out: Path, settings: dict[str, Any], ranks: Ranks, steps: int) -> None:
    """Train with the first seed for which no choice of experts depends on rounding; record that
    seed."""
    for seed in range(50):
        settings["run"]["seed"] = seed
        config = from_dict(settings, out.stem)
        try:
            with (
                patch.object(kernels.moe.router, "choose", steady(kernels.moe.router.choose)),
                patch.object(models.balance, "top_indices", steady(models.balance.top_indices)),
            ):
                train(out, config, ranks, "none", steps)
        except Fragile:
            continue
        out.with_suffix(".seed").write_text(str(seed))
        return
    raise AssertionError(f"{out.stem}: every seed has a tie")


def main(folder: Path, cases: list[dict[str, Any]]) -> None:
    ranks = start_ranks(threads=1)
    for case in cases:
        out = folder / f"{case['name']}.safetensors"
        if ranks.world == 1:
            train_steadily(out, case["settings"], ranks, case["steps"])
        else:
            config = from_dict(case["settings"], case["name"])
            train(out, config, ranks, case["fault"], case["steps"], case["whole"])
    stop_ranks()


if __name__ == "__main__":
    # a view that leaves a module of FSDP2's loses its hook with the next in-place operation
    warnings.filterwarnings("error", message="FSDP2-wrapped module")
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))

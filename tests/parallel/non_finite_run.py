"""Behavior of a step with numbers out of range: `torchrun non_finite_run.py FOLDER [all]`.

A parameter of every kind, of several models, or all of them, gets one bad value, in the last shard
of the last rank that has one. Writes `FOLDER/faults.json`, an empty list if every rank stopped with
the right error and no state changed.
"""

import json
import math
import re
import sys
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import train.step
from models.fp8 import fp8_weights
from parallel.grad_norm import LARGEST
from parallel.ranks import Ranks, gather_json, start_ranks, stop_ranks
from parallel.shards import local_of
from tests.parallel.fp8 import fp8_models
from tests.parallel.mesh.checkpoint_run import Run
from tests.parallel.mesh.meshes import Case
from train.step import NonFiniteError

BAD = {
    math.nan: "nan", math.inf: "inf", -math.inf: "inf", 3e38: "3e+38, more than 1.8e+19",
    -2e19: "2e+19, more than 1.8e+19",
}  # fmt: skip
"""Values, and their descriptions in errors."""
CASES = [
    Case("gpt-oss", 1, 2, 1, 2, 1), Case("deepseek-v3-mtp", 1, 1, 2, 2, 1),
    Case("glm4", 2, 1, 1, 1, 1), fp8_models.Case("gqa", {"ep": 2}),
]  # fmt: skip


class Probe:
    """A run whose next step is bad; collects faults."""

    def __init__(self, case: Any, ranks: Ranks) -> None:
        settings = case.settings()
        if case != CASES[0]:  # one microbatch per step
            settings["train"]["micro_batch"] *= 2
        self.case, self.run, self.faults = case, Run(settings, case.name, ranks), list[str]()
        self.rank = ranks.rank

    def state(self) -> dict[str, Tensor]:
        return {name: local_of(tensor).detach() for name, tensor in self.run.state().items()}

    def stops(
        self, line: str, weights_are_good: bool = True, state: dict[str, Tensor] | None = None
    ) -> None:
        """The next step must stop everywhere with `line` (a pattern), and change no state."""
        state = state or self.state()
        before = {name: tensor.clone() for name, tensor in state.items()}
        try:
            said, good = str(self.run.step(1)), None
        except NonFiniteError as error:
            said, good = str(error), error.weights_are_good
        expected = f"step 1: {line}; stopped before the optimizer step"
        alike = len(set(gather_json(said))) == 1
        if not (alike and re.fullmatch(expected, said) and good is weights_are_good):
            self.faults.append(f"{self.case.name}: {said!r}, {good}, not {expected!r}")
        for name, tensor in state.items():
            if not torch.equal(tensor.nan_to_num(), before[name].nan_to_num()):
                self.faults.append(f"{self.case.name}: {line}: {name} changed")
        self.run.optimizer.zero_grad()

    def weights(self, kinds: set[Any] | None) -> None:
        """kinds: those of earlier parameters, of which no further ones are tried; None: try all."""
        model = self.run.model
        state, whole = train.step._state(model), self.state()
        biases = [name for name, _ in model.named_buffers() if name.endswith("bias_E")]
        names = list(state)
        if {*names} != {*biases, *(name for name, _ in model.named_parameters())}:
            self.faults.append(f"{self.case.name}: not all weights and biases are looked at")
        if kinds is not None:
            names = [name for name in reversed(state) if self.is_new(name, state[name], kinds)]
        for name, (value, told) in zip(names, cycle(BAD.items()), strict=False):
            tensor = state[name]
            owners = [r for r, n in enumerate(gather_json(local_of(tensor).numel())) if n]
            if name.endswith("bias_E"):  # every rank has the whole of it
                owners = owners[-1:]
            local, last = local_of(tensor).detach(), (-1,) * tensor.ndim
            kept = local.clone()
            if self.rank == owners[-1]:
                local[last] = value
            self.run.fp8_weights.refresh()
            line = f"the weight {name} has {told} on rank {owners[-1]}"
            self.stops(re.escape(line), weights_are_good=False, state=whole)
            local.copy_(kept)
        self.run.fp8_weights.refresh()

    def is_new(self, name: str, tensor: Tensor, kinds: set[Any]) -> bool:
        """Whether no earlier one has its name, but for a number, or no earlier one of this model is
        divided and gathered as it is; adds these properties to `kinds`."""
        places: Any = None
        if isinstance(tensor, DTensor):
            places = tensor.device_mesh.mesh_dim_names, tensor.placements
        mine = {re.sub(r"\.\d+\.", ".", name),
                (self.case.name, places, name in fp8_weights(self.run.model))}  # fmt: skip
        is_new = not mine <= kinds
        kinds |= mine
        return is_new

    def hidden_states(self) -> None:
        """Every value is in range, but the squares of a row are not."""
        embed = local_of(self.run.model.embed.weight).detach()
        kept = embed.clone()
        embed[0] = 1.5e19
        self.stops("before the last norm a token's norm has inf on rank 0, 1", False)
        embed.copy_(kept)

    def losses(self) -> None:
        loss_sums = train.step.loss_sums

        def changed(*arguments: Any) -> Tensor:
            nan = torch.nan if self.rank else 0.0
            return loss_sums(*arguments) + torch.tensor(nan)

        with patch.object(train.step, "loss_sums", changed):
            self.stops("the loss is nan on rank 1")

    def gradients(self) -> None:
        """Two gradients have a NaN on the first rank; then all of them are large."""
        find, model = train.step.global_grad_norm, self.run.model
        name = "layers.1.attention.wo.weight"
        bad = [model.embed.weight, model.get_parameter(name)]

        def changed(*arguments: Any) -> Tensor:
            for parameter in bad if not self.rank else []:
                assert parameter.grad is not None
                local_of(parameter.grad)[0] = torch.nan
            return find(*arguments)

        with patch.object(train.step, "global_grad_norm", changed):
            self.stops(rf"the gradient of {re.escape(name)} has nan \(and 1 more\) on rank 0")
        self.scaled(1e25, r"the gradient of head.weight has .*e\+2\d, more than 1.8e\+19 .*")
        times = 1e16 * LARGEST / self.scaled(1e16).grad_norm
        self.scaled(2 * times, r"the gradient's norm is more than 1.8e\+19: that of .*")
        self.scaled(0.5 * times)

    def scaled(self, factor: float, line: str = "") -> Any:
        """A step with gradients that are larger by a factor; it must stop with `line` if given."""
        loss_sums = train.step.loss_sums

        def changed(*arguments: Any) -> Tensor:
            losses = loss_sums(*arguments)
            return losses.detach() + (losses - losses.detach()) * factor

        with patch.object(train.step, "loss_sums", changed):
            return self.stops(line) if line else self.run.step(1)


def main(folder: Path, every: bool) -> None:
    ranks = start_ranks(threads=1)
    faults, kinds = list[str](), None if every else set[Any]()
    for case in CASES:
        probe = Probe(case, ranks)
        probe.weights(kinds)
        if case == CASES[0]:
            probe.hidden_states()
            probe.losses()
            probe.gradients()
        faults += [fault for each in gather_json(probe.faults) for fault in each]
    if ranks.is_first:
        (folder / "faults.json").write_text(json.dumps(faults))
    stop_ranks()


if __name__ == "__main__":
    main(Path(sys.argv[1]), "all" in sys.argv)

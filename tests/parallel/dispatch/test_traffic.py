"""The counted collectives of one step equal those that the docstrings and `--check` predict.

Formulas: `parallel.tensor`, `parallel.expert`, `parallel.dispatch.all_to_all`, `parallel.apply`,
`parallel.fsdp.fp8_weights`, and the sums of `train.step`. Everything is fp32, except weights
gathered in FP8; [calls, bytes] are summed over the ranks.
"""

import json
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.loader import from_dict
from configs.model import ModelConfig
from configs.parallel_dims import resolve
from configs.precision import FP8Config
from models.decoder import Decoder
from models.fp8 import apply_fp8
from models.layers.linear import as_matrices
from tests.models.families import FAMILIES
from tests.parallel.fp8.fp8_models import GQA, MLA
from tests.parallel.mesh.meshes import GLOBAL_BATCH, PASSES, SEQ_LEN, Case, wide
from tests.runs import run
from train.memory import predict_even

CASES = [
    Case("glm4", 1, 2, 2, 4, 1),
    Case("glm4", 2, 2, 1, 2, 1),
    Case("glm4", 1, 1, 4, 1, 1, (("reshard_after_forward", False),)),
    # recomputation does not repeat exchanges whose results are kept
    Case("glm4", 1, 2, 2, 4, 1, (("reshard_after_forward", False), ("recompute", "selective"),
                                 ("recompute_keep", ("exchange",)))),
    Case("deepseek-v3", 1, 2, 2, 2, 2),
    Case("gpt-oss", 1, 2, 2, 1, 2),
]  # fmt: skip
STAGES = [
    Case("glm4", 1, 2, 2, 4, 1, (("zero_stage", 2),)),
    Case("glm4", 2, 2, 1, 2, 1, (("zero_stage", 1),)),
    Case("glm4", 2, 2, 1, 1, 1, (("zero_stage", 3), ("expert_zero_stage", 1))),
    Case("fp8", 1, 4, 1, 2, 1, (("zero_stage", 1), ("expert_zero_stage", 2))),
]
FP8_CASES = [
    Case("fp8", 1, 2, 2, 4, 1), Case("fp8", 2, 2, 1, 2, 1), Case("fp8", 1, 4, 1, 1, 1),
    Case("fp8", 1, 2, 2, 1, 2, (("reshard_after_forward", False),)),
    Case("fp8-mla", 1, 2, 2, 2, 2),
]  # fmt: skip
FP8_MODEL = replace(
    GQA,
    moe=replace(GQA.moe, seq_aux_loss_coef=0.1, global_aux_loss_coef=0.1, router_z_loss_coef=0.1),
)
FP8_MODELS = {"fp8": FP8_MODEL, "fp8-mla": replace(FP8_MODEL, attention=MLA.attention)}
FLOAT, INT = 4, 8
CollectiveTraffic = dict[str, dict[str, list[int]]]


class Formula:
    """The traffic of one step on one mesh."""

    def __init__(self, case: Case) -> None:
        self.case, fp8 = case, case.family in FP8_MODELS
        self.model = FP8_MODELS[case.family] if fp8 else wide(FAMILIES[case.family])
        self.grids = grids_of(self.model) if fp8 else {}
        self.maxima: dict[str, int] = defaultdict(int)
        self.ranks = case.world
        self.tokens = GLOBAL_BATCH // PASSES // (case.dp_replicate * case.dp_shard) * SEQ_LEN
        self.traffic: CollectiveTraffic = defaultdict(lambda: defaultdict(lambda: [0, 0]))
        self.sizes = sizes_of(self.model)
        self.moe_layers = [i for i in range(self.model.n_layers) if self.model.is_moe(i)]
        self._tensor_parallel()
        self._experts()
        self._fsdp()
        self._step()

    def add(self, axis: str, kind: str, size: int, calls: int = PASSES) -> None:
        """`calls` per rank of `size` bytes each."""
        if getattr(self.case, axis, self.ranks) == 1:
            return
        self.traffic[axis][kind][0] += calls * self.ranks
        self.traffic[axis][kind][1] += calls * size * self.ranks

    def _tensor_parallel(self) -> None:
        model, tokens = self.model, self.tokens
        full = tokens * model.d_model * FLOAT
        a = model.attention
        shared = len(self.moe_layers) if model.moe.n_shared_experts else 0
        forwards = model.n_layers - len(self.moe_layers) + shared
        inputs = [full] * (forwards + 1)  # and the head
        if a.kind == "mla":
            narrow = [a.q_lora_rank or model.d_model, a.kv_lora_rank + a.qk_rope_head_dim]
            inputs += [tokens * width * FLOAT for width in narrow] * model.n_layers
        else:
            inputs += [full] * model.n_layers
        outputs = [full] * (forwards + 1 + model.n_layers)  # and the embedding
        for gathered, scattered in (("allgather", "reducescatter"), ("reducescatter", "allgather")):
            for size in inputs:
                self.add("tp", gathered, size)
            for size in outputs:
                self.add("tp", scattered, size)
        self.add("tp", "allreduce", tokens * FLOAT, 2 * PASSES)  # maximum and sum of the softmax

    def _experts(self) -> None:
        case, moe, width = self.case, self.model.moe, self.model.d_model * FLOAT
        mine = self.tokens // case.tp
        for _ in self.moe_layers:
            rows = self.tokens if case.etp > 1 else mine
            self.add("etp", "allgather", rows * width)
            self.add("etp", "allgather", rows * moe.top_k * INT)
            self.add("etp", "allgather", rows * moe.top_k * FLOAT)
            self.add("etp", "reducescatter", rows * width)
            self.add("etp", "reducescatter", rows * width)
            self.add("etp", "reducescatter", rows * moe.top_k * FLOAT)
            self.add("etp", "allgather", rows * width)
            self.add("world", "allreduce", moe.n_experts * INT)  # for the global balance loss
            sequences = self.tokens // SEQ_LEN  # and for that of sequences
            self.add("tp", "allreduce", sequences * moe.n_experts * FLOAT)
            self.add("ep", "alltoall", moe.n_experts * INT)
            for _ in range(2):  # forward and backward; over all ranks, received = sent
                self.add("ep", "alltoall", rows * moe.top_k * width)
                self.add("ep", "alltoall", rows * moe.top_k * FLOAT)
                self.add("ep", "alltoall", rows * moe.top_k * width)

    def _fsdp(self) -> None:
        case, tp = self.case, self.case.tp
        stages = dict(case.more)
        dense = int(stages.get("zero_stage", 3))
        routed = int(stages.get("expert_zero_stage", dense))
        experts_alone = case.ep > 1 or tp > 1 or dense != routed
        for i in range(self.model.n_layers):
            divided, undivided = Part(), Part()
            for name, (size, split) in self.sizes.items():
                if not name.startswith(f"layers.{i}."):
                    continue
                if ".experts." in name and experts_alone:
                    continue
                if split or tp == 1:
                    divided += self._part(name, size, tp if split else 1)
                else:
                    n_ranks = case.dp_shard * tp  # a vector's elements are rounded up to these
                    undivided += self._part(name, -(-size // n_ranks) * n_ranks, 1)
            experts = Part()
            for name, (size, _) in self.sizes.items():
                if name.startswith(f"layers.{i}.") and ".experts." in name and experts_alone:
                    experts += self._part(name, size, case.ep * case.etp)
            self._group("dp_shard", case.dp_shard, divided, dense)
            self._group("dp_shard_tp", case.dp_shard * tp, undivided, dense)
            self._group("efsdp", case.dp_shard * tp // (case.ep * case.etp), experts, routed)
        root = {n: s for n, (s, _) in self.sizes.items() if not n.startswith("layers.")}
        norm = root.pop("norm.weight")
        held = sum(root.values()) // tp + (norm if tp == 1 else 0)
        self._group("dp_shard", case.dp_shard, Part(held, held * FLOAT), dense, root=True)
        rest = Part() if tp == 1 else Part(norm, norm * FLOAT)
        self._group("dp_shard_tp", case.dp_shard * tp, rest, dense)

    def _part(self, name: str, size: int, ranks: int) -> "Part":
        """The part of one parameter, which this many ranks divide before FSDP2 shards it."""
        blocks = self.grids.get(name, 0)
        return Part(size // ranks, size // ranks * (1 if blocks else FLOAT), blocks // ranks)

    def _group(self, axis: str, n_ranks: int, part: "Part", stage: int, root: bool = False) -> None:
        numel = part.numel
        if not numel:
            return
        reshard = dict(self.case.more).get("reshard_after_forward", True) and not root
        gathers = (2 if reshard else 1) * PASSES if stage == 3 else 1
        reductions = PASSES if stage > 1 else 1
        if n_ranks > 1:
            self.maxima[axis] += part.blocks * FLOAT
            self.add(axis, "allgather", part.gathered, gathers)
            self.add(axis, "reducescatter", numel * FLOAT, reductions)
        self.add("dp_replicate", "allreduce", numel * FLOAT // n_ranks, reductions)

    def _step(self) -> None:
        n_layers, n_experts = len(self.moe_layers), self.model.moe.n_experts
        choices = n_layers * n_experts * INT
        if self.case.ep > 1:  # the dispatchers' statistics are in the same all-reduce
            choices += n_layers * (3 + 2 * self.ranks) * INT
        # tokens, targets and ranks with bad weights; squared norm in fp64; loss, ranks with bad
        # hidden states and with bad gradients of replicas; choices; auxiliary losses
        for size in (3 * INT, INT, 3 * FLOAT, choices, 3 * FLOAT):
            self.add("world", "allreduce", size, 1)


@dataclass(frozen=True)
class Part:
    """Some parameters of one group of FSDP2's."""

    numel: int = 0
    gathered: int = 0
    """Bytes that are gathered."""
    blocks: int = 0
    """Number of blocks that have a scale."""

    def __add__(self, other: "Part") -> "Part":
        return Part(
            self.numel + other.numel, self.gathered + other.gathered, self.blocks + other.blocks
        )


def grids_of(model: ModelConfig) -> dict[str, int]:
    """Number of 128x128 blocks of every quantized parameter."""
    with torch.device("meta"):
        decoder = Decoder(model)
    found = {}
    for name in apply_fp8(decoder, FP8Config()):
        for key, parameter in decoder.get_submodule(name).named_parameters(recurse=False):
            matrices = as_matrices(key, parameter)
            rows, columns = matrices.shape[-2:]
            found[f"{name}.{key}"] = (
                matrices.shape[:-2].numel() * -(-rows // 128) * -(-columns // 128)
            )
    return found


def sizes_of(model: ModelConfig) -> dict[str, tuple[int, bool]]:
    """Elements of every parameter and whether tensor parallelism divides it."""
    with torch.device("meta"):
        parameters = dict(Decoder(model).named_parameters())
    whole = ("norm.weight", "wq_a.weight", "wkv_a.weight", "router.weight", "router.bias")
    return {name: (p.numel(), not name.endswith(whole)) for name, p in parameters.items()}


def settings_of(case: Case) -> dict[str, Any]:
    if case.family not in FP8_MODELS:
        return case.settings()
    settings = replace(case, family="glm4").settings()
    return settings | {
        "model": asdict(FP8_MODELS[case.family]),
        "precision": {"recipe": "fp8_blockwise"},
    }


@pytest.mark.long
@pytest.mark.parametrize(
    "cases",
    [
        # both recipes, all axes, every stage of ZeRO; an exchange that is kept
        [Case("fp8-mla", 1, 2, 2, 1, 2, (("zero_stage", 3), ("expert_zero_stage", 2))),
         Case("glm4", 2, 1, 2, 2, 1, (("zero_stage", 1), *CASES[3].more[1:]))],
        pytest.param([CASES[3], replace(FP8_CASES[4], more=(("zero_stage", 2),)), STAGES[2]],
                     marks=pytest.mark.slow),
        pytest.param([CASES[5], STAGES[0], STAGES[1], STAGES[3]], marks=pytest.mark.slow),
        pytest.param([*CASES[:3], CASES[4]], marks=pytest.mark.slow),
        pytest.param(FP8_CASES, marks=pytest.mark.slow),
    ],
    ids=lambda cases: ", ".join(case.name for case in cases),
)  # fmt: skip
def test_a_step_communicates_what_the_formulas_say(cases: list[Case], tmp_path: Path) -> None:
    reports = counted(tmp_path, {case.name: settings_of(case) for case in cases}, "float32")
    for case in cases:
        report = reports[case.name]
        expected: CollectiveTraffic = defaultdict(lambda: defaultdict(lambda: [0, 0]))
        formula, maxima = Formula(case), defaultdict[str, int](int)
        for axis, size in formula.maxima.items():  # once per step and group of ranks
            maxima[report["same"].get(axis, axis)] += size
        for axis, size in maxima.items():
            if size:
                formula.add(axis, "allreduce", size, 1)
        for axis, found in formula.traffic.items():
            for kind, (calls, size) in found.items():
                entry = expected[report["same"].get(axis, axis)][kind]
                entry[0] += calls
                entry[1] += size
        assert report["total"] == expected, case.name
        shown = predicted(settings_of(case), report["same"], torch.float32)
        assert shown == bytes_of(formula.traffic, report["same"]), case.name


@pytest.mark.slow
def test_check_predicts_the_bytes_of_both_recipes(tmp_path: Path) -> None:
    """In bf16, with meshes on which no axis contains all ranks, so that sums over all ranks have a
    separate group."""
    cases = {
        f"{recipe} {more}": settings_of(Case("fp8", 2, 2, 1, 2, 1, dispatch=more))
        | {"precision": {"recipe": recipe}}
        for recipe in ("bf16", "fp8_blockwise")
        for more in ((), (("dispatch_dtype", "fp8"), ("chunks", 2)), (("kind", "sync_free"),))
    }
    reports = counted(tmp_path, cases, "bfloat16")
    sums = []
    for name, settings in cases.items():
        shown = predicted(settings, reports[name]["same"], torch.bfloat16)
        assert shown == bytes_of(reports[name]["total"], {}), name
        sums.append(shown["dp_shard allgather"] + shown["efsdp allgather"])
    assert sums[3] == sums[4] == sums[5] < 0.6 * sums[0]


def counted(folder: Path, cases: dict[str, dict[str, Any]], compute: str) -> dict[str, Any]:
    """What four ranks exchanged in one step of each experiment."""
    listed = [{"name": n, "settings": s, "compute": compute} for n, s in cases.items()]
    (folder / "cases.json").write_text(json.dumps(listed))
    run("tests/parallel/dispatch/traffic_run.py", folder, folder / "cases.json", ranks=4)
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in cases}


def predicted(
    settings: dict[str, Any], same: dict[str, str], compute: torch.dtype
) -> dict[str, int]:
    """Bytes of four ranks by axis and kind of collective, as predicted by `--check`."""
    config = from_dict(settings, "experiment")
    needs = predict_even(config, resolve(config, 4), "cpu", compute)
    found: dict[str, int] = defaultdict(int)
    for name, size in needs.exchanged.items():
        axis, kind = name.rsplit(" ", 1)
        found[f"{same.get(axis, axis)} {kind.replace('-', '')}"] += 4 * size
    return found


def bytes_of(traffic: CollectiveTraffic, same: dict[str, str]) -> dict[str, int]:
    """The same from counted or computed traffic, without the sums over all ranks."""
    found: dict[str, int] = defaultdict(int)
    for axis, kinds in traffic.items():
        for kind, (_, size) in kinds.items():
            if axis != "world":
                found[f"{same.get(axis, axis)} {kind}"] += size
    return found


def test_weights_in_fp8_are_gathered_at_half_the_bytes_of_bf16() -> None:
    """Computed by the formulas, which the test above compares with counts; the exception are
    weights that are never quantized."""
    formula = Formula(FP8_CASES[2])
    gathered = formula.traffic["dp_shard"]["allgather"][1] / formula.ranks / PASSES / 2
    quantised = sum(size for name, (size, _) in formula.sizes.items() if name in formula.grids)
    others = sum(size for name, (size, _) in formula.sizes.items() if name not in formula.grids)
    root = sum(size for name, (size, _) in formula.sizes.items() if not name.startswith("layers."))
    assert gathered == quantised + FLOAT * (others - root / 2)  # the root is gathered once
    assert sum(formula.maxima.values()) < 0.001 * gathered
    assert quantised > 20 * others

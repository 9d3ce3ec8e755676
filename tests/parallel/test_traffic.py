"""The collectives of one step, counted, are those that the docstrings name.

Formulas: `parallel.tensor`, `parallel.expert`, `parallel.dispatch.all_to_all`, `parallel.apply`,
and the sums of `train.step`. Everything is fp32; [calls, bytes] are summed over the ranks.
"""

import json
from collections import defaultdict
from pathlib import Path

import torch

from configs.model import Model
from models.decoder import Decoder
from tests.models.families import FAMILIES
from tests.parallel.meshes import GLOBAL_BATCH, PASSES, SEQ_LEN, Case, wide
from tests.runs import run

CASES = [
    Case("glm4", 1, 2, 2, 4, 1),
    Case("glm4", 2, 2, 1, 2, 1),
    Case("glm4", 1, 1, 4, 1, 1, (("reshard_after_forward", False),)),
    # exchanges whose results are kept do not happen again in recomputation
    Case("glm4", 1, 2, 2, 4, 1, (("reshard_after_forward", False), ("recompute", "selective"),
                                 ("recompute_keep", ("exchange",)))),
    Case("deepseek-v3", 1, 2, 2, 2, 2),
    Case("gpt-oss", 1, 2, 2, 1, 2),
]  # fmt: skip
FLOAT, INT = 4, 8
Traffic = dict[str, dict[str, list[int]]]


class Formula:
    """The traffic of one step on one mesh."""

    def __init__(self, case: Case) -> None:
        self.case, self.model = case, wide(FAMILIES[case.family])
        self.ranks = case.world
        self.tokens = GLOBAL_BATCH // PASSES // (case.dp_replicate * case.dp_shard) * SEQ_LEN
        self.traffic: Traffic = defaultdict(lambda: defaultdict(lambda: [0, 0]))
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
            for _ in range(2):  # forward and backward; what a rank gets, all ranks got from all
                self.add("ep", "alltoall", rows * moe.top_k * width)
                self.add("ep", "alltoall", rows * moe.top_k * FLOAT)
                self.add("ep", "alltoall", rows * moe.top_k * width)

    def _fsdp(self) -> None:
        case, tp = self.case, self.case.tp
        experts_alone = case.ep > 1 or tp > 1
        for i in range(self.model.n_layers):
            divided = undivided = 0
            for name, (size, split) in self.sizes.items():
                if not name.startswith(f"layers.{i}."):
                    continue
                if ".experts." in name and experts_alone:
                    continue
                divided += size // tp if split else 0
                n_ranks = case.dp_shard * tp  # among which the elements of a vector are rounded up
                undivided += 0 if split else -(-size // n_ranks) * n_ranks
            if tp == 1:
                divided, undivided = divided + undivided, 0
            experts = sum(
                size // (case.ep * case.etp)
                for name, (size, _) in self.sizes.items()
                if name.startswith(f"layers.{i}.") and ".experts." in name and experts_alone
            )
            self._group("dp_shard", case.dp_shard, divided)
            self._group("dp_shard_tp", case.dp_shard * tp, undivided)
            self._group("efsdp", case.dp_shard * tp // (case.ep * case.etp), experts)
        root = {n: s for n, (s, _) in self.sizes.items() if not n.startswith("layers.")}
        norm = root.pop("norm.weight")
        held = sum(root.values()) // tp + (norm if tp == 1 else 0)
        self._group("dp_shard", case.dp_shard, held, root=True)
        self._group("dp_shard_tp", case.dp_shard * tp, 0 if tp == 1 else norm)

    def _group(self, axis: str, n_ranks: int, numel: int, root: bool = False) -> None:
        if not numel:
            return
        reshard = dict(self.case.more).get("reshard_after_forward", True) and not root
        if n_ranks > 1:
            self.add(axis, "allgather", numel * FLOAT, PASSES * (2 if reshard else 1))
            self.add(axis, "reducescatter", numel * FLOAT)
        self.add("dp_replicate", "allreduce", numel * FLOAT // n_ranks)

    def _step(self) -> None:
        n_layers, n_experts = len(self.moe_layers), self.model.moe.n_experts
        choices = n_layers * n_experts * INT
        if self.case.ep > 1:  # the dispatchers' numbers travel with the choices
            choices += n_layers * (3 + 2 * self.ranks) * INT
        # tokens and targets, squared norm in fp64, loss, choices, auxiliary losses
        for size in (2 * INT, INT, FLOAT, choices, 3 * FLOAT):
            self.add("world", "allreduce", size, 1)


def sizes_of(model: Model) -> dict[str, tuple[int, bool]]:
    """Elements of every parameter and whether tensor parallelism divides it."""
    with torch.device("meta"):
        parameters = dict(Decoder(model).named_parameters())
    whole = ("norm.weight", "wq_a.weight", "wkv_a.weight", "router.weight", "router.bias")
    return {name: (p.numel(), not name.endswith(whole)) for name, p in parameters.items()}


def test_a_step_communicates_what_the_formulas_say(tmp_path: Path) -> None:
    listed = [{"name": case.name, "settings": case.settings()} for case in CASES]
    (tmp_path / "cases.json").write_text(json.dumps(listed))
    run("tests/parallel/traffic_run.py", tmp_path, tmp_path / "cases.json", ranks=4)
    for case in CASES:
        report = json.loads((tmp_path / f"{case.name}.json").read_text())
        expected: Traffic = defaultdict(lambda: defaultdict(lambda: [0, 0]))
        for axis, found in Formula(case).traffic.items():
            for kind, (calls, size) in found.items():
                entry = expected[report["same"].get(axis, axis)][kind]
                entry[0] += calls
                entry[1] += size
        assert report["total"] == expected, case.name

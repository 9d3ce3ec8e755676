"""Serves exports on the ranks this is started with, and compares with one process and the trainer.

`torchrun mesh_run.py FOLDER CASES.json OUT.json`, with the exports in FOLDER by family. A case is
`{"family", "tp", "ep", "dtype"}`; for each, OUT.json has what was found (see `compare`).
"""

import json
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from configs.loader import from_dict
from configs.model import ModelConfig
from configs.parallel_dims import resolve_serving
from models.decoder import Decoder
from models.documents import DocumentAttention
from models.hf.files import read_config, read_model
from parallel.apply import InferenceSharding, materialize
from parallel.fsdp.fp8_weights import gather_in_fp8
from parallel.mesh import build
from parallel.ranks import Ranks, gather_json, start_ranks, stop_ranks
from parallel.shards import box_of, local_of
from serve.cache.kv_cache import KvCache
from serve.engine.core import EngineCore, EngineOptions, make_cache, make_runner
from serve.engine.loading import Export, open_export
from serve.engine.rank_group import RankGroup
from serve.engine.runner import ModelRunner
from serve.frontend.follow import follow
from tests.parallel.mesh.meshes import Case
from tests.serve.drive import complete, greedy
from tests.serve.test_runner import Sequence, random_sequences, run_in_random_steps
from train.build import shard_model

_DRAW = random.Random(0)
TOKENS = [[_DRAW.randrange(90) for _ in range(n)] for n in (1, 7, 19, 37)]
OPTIONS = EngineOptions(
    kv_tokens=512, page_size=8, max_running=3, max_batch_tokens=20, routed_experts=True
)
PROMPTS = [[1], [5, 17, 25, 3], [*range(40, 61)], [*range(40, 59), 3, 9]]


@dataclass(frozen=True)
class Server:
    """One export on all ranks."""

    folder: Path
    export: Export

    @staticmethod
    def open(folder: Path, case: dict[str, Any], ranks: Ranks) -> "Server":
        model, _ = read_config(folder)
        dims = resolve_serving(model, case["tp"], case["ep"], ranks.world)
        group = RankGroup(ranks, InferenceSharding(build(dims, "cpu")), folder.name)
        return Server(folder, open_export(folder, case["dtype"], "cpu", group))

    @property
    def group(self) -> RankGroup:
        assert self.export.group is not None
        return self.export.group

    def again(self) -> "Server":
        """The same for another engine: a group is stopped once."""
        group = RankGroup(self.group.ranks, self.group.sharding, self.group.name)
        return Server(self.folder, Export(**{**vars(self.export), "group": group}))


def rows_of_random_steps(server: Server, seed: int) -> list[Sequence]:
    """Every row's logits, on rank 0; other chunks and other batches with another seed."""
    if not server.group.ranks.is_first:
        follow(server.export, OPTIONS)
        return []
    cache = make_cache(server.export, OPTIONS)
    runner = make_runner(server.export, cache, OPTIONS)
    server.group.begin()
    sequences = in_pages(cache)
    run_in_random_steps(random.Random(seed), runner, sequences, 30)
    server.group.stop()
    return sequences


def in_pages(cache: KvCache) -> list[Sequence]:
    """The sequences, with pages of a cache that is full of NaN."""
    made = random_sequences(random.Random(0), cache, [len(tokens) for tokens in TOKENS])
    for sequence, tokens in zip(made, TOKENS, strict=True):
        sequence.tokens = tokens
    return made


def answers(server: Server) -> list[dict[str, Any]]:
    """What the whole engine generates, on rank 0."""
    if server.export.group is not None and not server.group.ranks.is_first:
        follow(server.export, OPTIONS)
        return []
    core = EngineCore(server.export, OPTIONS)
    params = greedy(5, logprobs=3, prompt_logprobs=2, return_routed_experts=True)
    done = complete(core, PROMPTS, params)
    core.close()
    return [
        {
            "tokens": each.tokens,
            "logprobs": [[one.logprob, *(value for _, value in one.top)] for one in each.logprobs],
            "prompt": [one.logprob for one in each.request.prompt_logprobs],
            "experts": each.request.routed_experts.tolist(),
        }
        for each in done
        if each.request is not None and each.request.routed_experts is not None
    ]


@torch.no_grad()
def trainer_logits(server: Server) -> list[Tensor]:
    """Logits of every sequence by the trainer's model on the same mesh, on every rank; in FP8 from
    the weights of which the export has the blocks."""
    dims, ranks = server.group.dims, server.group.ranks
    settings = Case("qwen3", 1, dims.dp_shard, dims.tp, dims.ep, dims.etp).settings()
    settings["model"] = asdict(read_config(server.folder)[0])
    masters = server.folder.with_suffix(".masters")
    if masters.exists():
        settings["precision"] = {"recipe": "fp8_blockwise"}
        state = load_file(masters)
    else:
        state = read_model(server.folder, torch.float32).state_dict()
    config = from_dict(settings, "case")
    model = shard_model(config, ranks, server.export.dtype).model
    materialize(model, config.model, 0, ranks.device)
    fp8_weights = gather_in_fp8(model, config.parallel)
    for name, parameter in model.named_parameters():
        local_of(parameter).copy_(state[name][box_of(parameter).slices()])
    for name, buffer in model.named_buffers():
        buffer.copy_(state[name])
    fp8_weights.refresh()
    found = []
    for tokens in TOKENS:
        padded = torch.tensor(tokens + [0] * (-len(tokens) % 16))
        positions = torch.arange(len(padded))
        logits = model.eval()(padded, positions, DocumentAttention(positions[None]), F.linear)
        if dims.tp > 1:
            logits = model.tp_comm.gather(logits.T).T
        found.append(logits[: len(tokens)].float())
    return found


def farthest(found: Any, expected: Any) -> float:
    """The largest difference of two nested lists of numbers."""
    if isinstance(found, list):
        assert len(found) == len(expected)
        return max((farthest(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)
    return abs(found - expected)


def alone(folder: Path, dtype: str) -> tuple[list[Tensor], Any]:
    """Logits of the rows, and answers, of one process."""
    export = open_export(folder, dtype, "cpu")
    cache = KvCache(export.model.config, 64, 8, export.dtype, export.device)
    ours = in_pages(cache)
    run_in_random_steps(random.Random(3), ModelRunner(export.model, cache), ours, 30)
    return [stacked(s) for s in ours], answers(Server(folder, export))


def stacked(s: Sequence) -> Tensor:
    return torch.stack([s.rows[p] for p in range(len(s.tokens))])


def compare(server: Server, case: dict[str, Any]) -> dict[str, Any]:
    """On rank 0, what is equal; to one process only where that is expected (see `is_near_one`).

    | key | content |
    |---|---|
    | trainer | whether the logits have the bits of the trainer's |
    | invariant | whether they do not depend on batches and chunks, where the trainer's may |
    | logits | their greatest difference to one process, as a share of the largest |
    | logprobs | the greatest difference of log-probabilities |
    | tokens, experts | whether greedy tokens and routed experts are those of one process |
    | held, whole | what every rank holds, and one process (see `held_by`) |
    """
    first, second = rows_of_random_steps(server, 1), None
    if case["tp"] > 2:
        second = rows_of_random_steps(server.again(), 2)
    trained = trainer_logits(server)
    served = answers(server.again()) if is_near_one(case) else []
    model = server.export.model.config
    held = gather_json(held_by(server.export.model, server.group.local_model(model)))
    if not server.group.ranks.is_first:
        return {}
    found = [stacked(s) for s in first]
    with torch.device("meta"):
        whole = Decoder(model)
    same = {
        "trainer": all(map(torch.equal, found, trained)),
        "invariant": second is None or all(map(torch.equal, found, map(stacked, second))),
        "held": held,
        "whole": held_by(whole, model),
    }
    if not is_near_one(case):
        return same
    rows, single = alone(server.folder, case["dtype"])
    scale = max(float(row.abs().max()) for row in rows)
    pairs = list(zip(served, single, strict=True))
    return same | {
        "logits": max(float((a - b).abs().max()) for a, b in zip(found, rows, strict=True)) / scale,
        "logprobs": max(
            farthest([a["logprobs"], a["prompt"]], [b["logprobs"], b["prompt"]]) for a, b in pairs
        ),
        "tokens": all(a["tokens"] == b["tokens"] for a, b in pairs),
        "experts": all(a["experts"] == b["experts"] for a, b in pairs),
    }


def is_near_one(case: dict[str, Any]) -> bool:
    """Whether one process has the same or almost the same numbers: in lower precision, sums over
    the ranks of tp have other tokens as their result."""
    return case["tp"] == 1 or case["dtype"] == "fp32"


def held_by(decoder: Decoder, model: ModelConfig) -> list[int]:
    """Elements of this rank's parts of the weights, and of what its KV cache has per token."""
    held = sum(local_of(parameter).numel() for parameter in decoder.parameters())
    return [held, KvCache(model, 1, 1, torch.float32, torch.device("cpu")).values_per_token]


if __name__ == "__main__":
    folder, cases, out = map(Path, sys.argv[1:])
    ranks = start_ranks(threads=1)
    found = []
    for case in json.loads(cases.read_text()):
        server = Server.open(folder / case["family"], case, ranks)
        found.append(compare(server, case))
    if ranks.is_first:
        out.write_text(json.dumps(found))
    stop_ranks()

"""Finds out exactly which parameters decay: `[torchrun] decay_run.py FOLDER [all]` writes
`FOLDER/faults.json`.

Without a gradient AdamW only decays: a step with learning rate 1/8 and weight decay 4 halves
decayed parameters, bit for bit, and leaves the others unchanged.
"""

import json
import re
import sys
from pathlib import Path
from typing import Literal

import torch

from configs.schema import OptimizerConfig
from models.decoder import Decoder
from parallel.ranks import gather_json, start_ranks, stop_ranks
from parallel.shards import local_of
from tests.models.families import FAMILIES
from tests.parallel.mesh.checkpoint_run import Run
from tests.parallel.mesh.meshes import Case, alone
from train.optim.optimizer import build_optimizer, set_learning_rate

DECAYS = {
    r"embed\.weight": True,
    r"head\.weight": True,
    r"mtp\.\d\.eh_proj\.weight": True,
    r"BLOCK\.attention\.(wq|wk|wv|wo|wq_a|wkv_a|wkv_b)\.weight": True,
    r"BLOCK\.attention\.(wq|wk|wv|wo)\.bias": False,
    r"BLOCK\.attention\.sinks": False,
    r"BLOCK\.attention\.(q|k|q_a|kv_a)_norm\.weight": False,
    r"BLOCK\.(attention_norm|ffn_norm)\.weight": False,
    r"mtp\.\d\.(enorm|hnorm|norm)\.weight": False,
    r"norm\.weight": False,
    r"BLOCK\.ffn\.(w13|w2)": True,
    r"BLOCK\.ffn\.shared_experts\.(w13|w2)": True,
    r"BLOCK\.ffn\.experts\.(w13|w2)": True,
    r"BLOCK\.ffn\.experts\.(b13|b2)": False,
    r"BLOCK\.ffn\.router\.(weight|bias)": False,
}
SOME = ("gpt-oss", "glm4-mtp", "deepseek-v3-mtp")
"""Families that together have every parameter."""
MESHES = {
    1: [alone(family) for family in FAMILIES if family in SOME or "all" in sys.argv],
    4: [
        Case("gpt-oss", 1, 2, 2, 2, 2), Case("deepseek-v3-mtp", 2, 1, 2, 2, 1),
    ],
}  # fmt: skip


def decays(name: str) -> bool:
    """Decay as in the table above; every name is in it once."""
    patterns = [p.replace("BLOCK", r"(?:layers|mtp)\.\d") for p in DECAYS]
    found = [d for p, d in zip(patterns, DECAYS.values(), strict=True) if re.fullmatch(p, name)]
    assert len(found) == 1, name
    return found[0]


def faults(model: Decoder, moments: Literal["fp32", "bf16"], where: str) -> list[str]:
    optimizer = build_optimizer(model, OptimizerConfig(lr=1.0, weight_decay=4.0), moments)
    parameters = dict(model.named_parameters())
    before = {name: local_of(p).detach().clone() for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    set_learning_rate(optimizer, 0.125)
    optimizer.step()
    found = []
    for name, parameter in parameters.items():
        expected = before[name] * (0.5 if decays(name) else 1.0)
        if before[name].numel() and not before[name].any():
            found.append(f"{name}: zero, which cannot decay")
        if not torch.equal(local_of(parameter), expected):
            found.append(f"{name}: decays as it should not, or does not as it should")
    return [f"{where}, moments in {moments}: {fault}" for fault in found]


if __name__ == "__main__":
    the_ranks = start_ranks(threads=1)
    mine: list[str] = []
    for one in MESHES[the_ranks.world]:
        built = Run(one.settings(), one.name, the_ranks).model
        where = f"{one.name}: rank {the_ranks.rank}"
        mine += faults(built, "fp32", where) + faults(built, "bf16", where)
    listed = [fault for each in gather_json(mine) for fault in each]
    if the_ranks.is_first:
        (Path(sys.argv[1]) / "faults.json").write_text(json.dumps(listed))
    stop_ranks()

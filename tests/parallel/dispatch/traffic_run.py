"""Counts the collectives and bytes of one training step, by process group.

`torchrun traffic_run.py FOLDER CASES.json` writes `FOLDER/NAME.json`: for every mesh axis the name
of its group, and for every group and operation [calls, bytes], both summed over all ranks. The
bytes of a call are those of its larger side (the output of a gather, the input of a reduction), for
an uneven exchange the sent bytes.
"""

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.mesh import Mesh
from parallel.ranks import gather_json, start_ranks, stop_ranks
from tests.parallel.mesh.checkpoint_run import Run

Counts = dict[str, dict[str, list[int]]]


class CollectiveCounter(TorchDispatchMode):
    """Records collectives by the name of their process group."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: Counts = defaultdict(lambda: defaultdict(lambda: [0, 0]))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        family, name, _ = str(func).split(".")
        kind = re.search("allgather|reducescatter|alltoall|allreduce", name.replace("_", ""))
        if "c10d" not in family or kind is None:
            return result
        functional = family == "_c10d_functional"
        # with gloo, FSDP2's reduce-scatter is that of `parallel.gloo`
        scatter = kind[0] == "alltoall" and not functional
        group = [a for a in args if isinstance(a, str)][-1] if functional else _group_of(args)
        listed = [t for a in args for t in (a if isinstance(a, list) else [a])]
        tensors = [t for t in [*listed, result] if isinstance(t, Tensor)]
        sent = tensors[0 if functional else 1] if kind[0] == "alltoall" else None
        entry = self.groups[group]["reducescatter" if scatter else kind[0]]
        entry[0] += 1
        entry[1] += sent.nbytes if sent is not None else max(t.nbytes for t in tensors)
        return result


def _group_of(args: Any) -> str:
    for argument in args:
        if isinstance(argument, torch.ScriptObject):
            try:
                return str(dist.ProcessGroup.unbox(argument).group_name)
            except RuntimeError:
                continue
    raise AssertionError("a collective without a group")


def axes(mesh: Mesh) -> list[tuple[str, str]]:
    """Every axis with its groups; axes that span the same ranks may share one."""
    views = (mesh.dense, mesh.whole, mesh.expert)
    named = [(axis, view[axis]) for view in views for axis in view.mesh_dim_names or ()]
    found = [(axis, one.get_group().group_name) for axis, one in named if one.size() > 1]
    everyone = dist.group.WORLD
    assert everyone is not None
    return [*found, ("world", everyone.group_name)]


def summed(groups: Counts, names: list[tuple[str, str]]) -> dict[str, Any]:
    """The counts of all ranks. Groups of one axis have different names on different ranks."""
    axis_of = {group: axis for axis, group in sorted(names, reverse=True)}
    total: Counts = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for one in gather_json([(axis_of[group], found) for group, found in groups.items()]):
        for axis, found in one:
            for kind, (calls, size) in found.items():
                total[axis][kind][0] += calls
                total[axis][kind][1] += size
    return {"same": {axis: axis_of[group] for axis, group in names}, "total": total}


if __name__ == "__main__":
    ranks = start_ranks(threads=1)
    for case in json.loads(Path(sys.argv[2]).read_text()):
        run = Run(case["settings"], case["name"], ranks, getattr(torch, case["compute"]))
        with CollectiveCounter() as traffic:
            run.step(1)
        report = summed(traffic.groups, axes(run.mesh))
        if ranks.is_first:
            (Path(sys.argv[1]) / f"{case['name']}.json").write_text(json.dumps(report))
    stop_ranks()

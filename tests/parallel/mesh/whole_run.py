"""Assembles parameters of a model on four ranks with our code and with torch: both must agree.

`torchrun whole_run.py FOLDER` writes `FOLDER/faults.json`, an empty list if there are none.
"""

import json
import re
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from parallel.ranks import gather_json, start_ranks, stop_ranks
from tests.parallel.mesh.checkpoint_run import Run
from tests.parallel.mesh.mesh_run import wholes
from tests.parallel.mesh.meshes import Case

if __name__ == "__main__":
    ranks = start_ranks(threads=1)
    faults = []
    for case in (Case("gpt-oss", 1, 2, 2, 2, 2), Case("glm4", 2, 2, 1, 2, 1)):
        parameters = dict(Run(case.settings(), case.name, ranks).model.named_parameters())
        # the layers of gpt-oss are divided alike, and torch's way is slow
        kinds = {re.sub(r"\.\d+\.", ".", name): name for name in parameters}
        parameters = {name: parameters[name] for name in kinds.values()}
        ours = wholes(parameters)
        for name, parameter in parameters.items():
            assert isinstance(parameter, DTensor)
            if not torch.equal(ours[name], parameter.full_tensor()):
                faults.append(f"{case.name}: {name} on rank {ranks.rank}")
    found = [fault for each in gather_json(faults) for fault in each]
    if ranks.is_first:
        (Path(sys.argv[1]) / "faults.json").write_text(json.dumps(found))
    stop_ranks()

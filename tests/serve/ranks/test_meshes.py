"""A server of several ranks gives what one process gives, and the bits of the trainer's mesh."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.hf.files import write_tensors
from models.hf.table import hf_config
from tests.models.test_invariance import lively
from tests.parallel.meshes import model_of
from tests.runs import ROOT, run
from tests.serve.test_runner import SERVED

MODULES = ("tests.serve.ranks.mesh_run",)


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an export of every family, in fp32."""
    folder = tmp_path_factory.mktemp("exports")
    for family in SERVED:
        model = model_of(family)
        state = lively(model, torch.float32).state_dict()
        (folder / family).mkdir()
        write_tensors(folder / family, model, lambda n, i, s=state: s[n][i], torch.float32)
        described = hf_config(model, max_positions=96, eos_token_id=None, dtype="float32")
        (folder / family / "config.json").write_text(json.dumps(described))
    return folder


def compared(exports: Path, folder: Path, ranks: int, cases: list[Any]) -> list[dict[str, Any]]:
    keys = ("family", "tp", "ep", "dtype")
    file, out = folder / "cases.json", folder / "out.json"
    file.write_text(json.dumps([dict(zip(keys, case, strict=True)) for case in cases]))
    program = ROOT / "tests" / "serve" / "ranks" / "mesh_run.py"
    run(program, exports, file, out, ranks=ranks, modules=MODULES, timeout=300)
    found: list[dict[str, Any]] = json.loads(out.read_text())
    return found

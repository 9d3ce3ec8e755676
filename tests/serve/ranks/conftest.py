"""Exports of small models that two and four ranks can divide."""

import json
from pathlib import Path

import pytest
import torch

from configs.model import ModelConfig
from models.hf.files import write_tensors
from models.hf.table import hf_config
from tests.models.test_invariance import lively
from tests.parallel.mesh.meshes import model_of
from tests.serve.test_runner import SERVED


def write_lively(folder: Path, model: ModelConfig, positions: int, seed: int = 0) -> Path:
    """An export in fp32 with weights of which every one matters."""
    state = lively(model, torch.float32, seed).state_dict()
    folder.mkdir(parents=True)
    write_tensors(folder, model, lambda name, index: state[name][index], torch.float32)
    described = hf_config(model, max_positions=positions, eos_token_id=0, dtype="float32")
    (folder / "config.json").write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an export of every family."""
    folder = tmp_path_factory.mktemp("exports")
    for family in SERVED:
        write_lively(folder / family, model_of(family), 96)
    return folder

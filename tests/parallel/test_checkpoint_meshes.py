"""What one mesh saved another resumes: the same state bit for bit, then the same next step.

Tolerance of that step: 1e-5 of each tensor's norm, as everywhere in fp32; the learning rate is
small, since AdamW turns rounding noise in tiny gradients into whole steps.
"""

import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.parallel.meshes import Case, all_meshes
from tests.runs import run

FAMILIES = ("glm4", "gpt-oss")
PAIRS = 20


def run_cases(folder: Path, world: int, cases: list[tuple[str, Case, str]]) -> None:
    """Run (name, mesh, name of the checkpoint to load) on `world` ranks."""
    listed = []
    for name, case, load in cases:
        settings = case.settings()
        settings["optimizer"] = {"lr": 1e-4}
        listed.append({"name": name, "settings": settings, "load": load})
    path = folder / f"cases-{world}.json"
    path.write_text(json.dumps(listed))
    run("tests/parallel/checkpoint_run.py", folder, path, ranks=world, timeout=900)


def test_any_mesh_resumes_what_any_mesh_saved(tmp_path: Path) -> None:
    rng = random.Random(3)
    every = {f: [case for w in (1, 2, 4) for case in all_meshes(f, w)] for f in FAMILIES}
    pairs = [rng.sample(every[FAMILIES[i % 2]], 2) for i in range(PAIRS)]
    saved = {f"saved {saver.name}": saver for saver, _ in pairs}
    for world in (1, 2, 4):
        savers = [(name, case, "") for name, case in saved.items() if case.world == world]
        run_cases(tmp_path, world, savers)
    for world in (1, 2, 4):
        loaders = [
            (f"{i}", loader, f"saved {saver.name}")
            for i, (saver, loader) in enumerate(pairs)
            if loader.world == world
        ]
        run_cases(tmp_path, world, loaders)
    for i, (saver, loader) in enumerate(pairs):
        expected = load_file(tmp_path / f"saved {saver.name}.safetensors")
        got = load_file(tmp_path / f"{i}.safetensors")
        assert got.keys() == expected.keys()
        for name, right in expected.items():
            place = f"{saver.name} -> {loader.name}: {name}"
            if name.startswith("before/"):
                assert torch.equal(got[name], right), place
            else:
                assert (got[name] - right).norm() <= 1e-5 * right.norm(), place

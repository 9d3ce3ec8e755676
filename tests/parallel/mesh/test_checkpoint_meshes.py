"""A checkpoint of one mesh resumes on another: the same state bit for bit, then the same next step.

Tolerance of that step: 1e-5 of each tensor's norm, as for all fp32 comparisons; the learning rate
is small, because AdamW turns rounding noise in tiny gradients into whole steps.
"""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.parallel.mesh.meshes import PASSES, Case, all_meshes, alone
from tests.runs import run

FAMILIES = ("glm4", "gpt-oss")
PAIRS = 20


def run_cases(folder: Path, world: int, cases: list[tuple[str, Case, str]]) -> None:
    """Run (name, mesh, name of the checkpoint to load) on `world` ranks."""
    listed = []
    for name, case, load in cases:
        settings = case.settings()
        settings["optimizer"] = {"lr": 1e-4}
        settings["train"]["micro_batch"] *= PASSES  # accumulation is not the subject
        listed.append({"name": name, "settings": settings, "load": load})
    path = folder / f"cases-{world}.json"
    path.write_text(json.dumps(listed))
    run("tests/parallel/mesh/checkpoint_run.py", folder, path, ranks=world, timeout=900)


SOME = [
    (Case("gpt-oss", 1, 2, 2, 2, 2), alone("gpt-oss")),
    (Case("gpt-oss", 1, 2, 2, 2, 2), Case("gpt-oss", 2, 2, 1, 2, 1)),
    (Case("glm4", 2, 1, 1, 1, 1), Case("glm4", 1, 1, 2, 1, 2)),
]
"""Saver and loader: 4 ranks to 1 and to 4, 2 to 2; every axis is divided in both."""
MORE = [(alone("glm4"), Case("glm4", 1, 2, 1, 2, 1))]
"""1 rank to 2."""


@pytest.mark.long
def test_one_mesh_resumes_what_another_saved(tmp_path: Path) -> None:
    assert_resumed(SOME, tmp_path)


@pytest.mark.slow
def test_any_mesh_resumes_what_any_mesh_saved(tmp_path: Path) -> None:
    rng = random.Random(3)
    every = {f: [case for w in (1, 2, 4) for case in all_meshes(f, w)] for f in FAMILIES}
    pairs = [rng.sample(every[FAMILIES[i % 2]], 2) for i in range(PAIRS)]
    assert_resumed([*MORE, *((saver, loader) for saver, loader in pairs)], tmp_path)


def assert_resumed(pairs: list[tuple[Case, Case]], tmp_path: Path) -> None:
    saved = {f"saved {saver.name}": saver for saver, _ in pairs}
    left = [(f"{i}", loader, f"saved {saver.name}") for i, (saver, loader) in enumerate(pairs)]
    cases = [(name, saver, "") for name, saver in saved.items()] + left
    done = set[str]()
    # two rounds: a loader runs in the start of its ranks in which, or before which, its saver did
    for world in (4, 2, 1) * 2:
        now = [
            (name, case, load)
            for name, case, load in cases
            if case.world == world
            and name not in done
            and (not load or load in done or saved[load].world == world)
        ]
        if now:
            run_cases(tmp_path, world, now)
            done |= {name for name, _, _ in now}
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

"""Weight decay applies to exactly the intended parameters, on any mesh."""

import json
from pathlib import Path

import pytest
import torch

from models.decoder import Decoder
from tests.models.families import FAMILIES
from tests.parallel.mesh.decay_run import DECAYS, decays
from tests.runs import run


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 4])
def test_decay_is_that_of_every_parameters_class(ranks: int, tmp_path: Path) -> None:
    run("tests/parallel/mesh/decay_run.py", tmp_path, ranks=ranks)
    faults = json.loads((tmp_path / "faults.json").read_text())
    assert not faults, "\n".join(faults)


def test_the_table_has_every_class_and_no_other() -> None:
    names = set()
    for family in FAMILIES.values():
        with torch.device("meta"):
            names |= {name for name, _ in Decoder(family).named_parameters()}
    assert {decays(name) for name in names} == {True, False}
    for pattern in DECAYS:
        only = {pattern: DECAYS[pattern]}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tests.parallel.mesh.decay_run.DECAYS", only)
            used = []
            for name in names:
                try:
                    used.append(decays(name))
                except AssertionError:
                    continue
            assert used, pattern

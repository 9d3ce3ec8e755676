"""Weight decay applies to exactly the intended parameters, on any mesh."""

import json
import re
from pathlib import Path

import pytest
import torch

from models.decoder import Decoder
from tests.models.families import FAMILIES
from tests.parallel.mesh.decay_run import DECAYS, SOME, decays
from tests.runs import run


@pytest.mark.long
@pytest.mark.parametrize(
    ("ranks", "families"),
    [(1, "some"), pytest.param(1, "all", marks=pytest.mark.slow), (4, "some")],
)
def test_decay_is_that_of_every_parameters_class(ranks: int, families: str, tmp_path: Path) -> None:
    run("tests/parallel/mesh/decay_run.py", tmp_path, families, ranks=ranks)
    faults = json.loads((tmp_path / "faults.json").read_text())
    assert not faults, "\n".join(faults)


def test_the_table_has_every_class_and_no_other() -> None:
    of = dict[str, set[str]]()
    for family, config in FAMILIES.items():
        with torch.device("meta"):
            of[family] = {name for name, _ in Decoder(config).named_parameters()}
    names = set().union(*of.values())
    kinds = [{re.sub(r"\d+", "", name) for name in some} for some in
             (names, set().union(*(of[family] for family in SOME)))]  # fmt: skip
    assert kinds[0] == kinds[1]
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

"""The checks of the GPU suite as tests."""

import pytest
import torch

from scripts.gpu_suite.harness import Place
from scripts.gpu_suite.runner.section import Section, Unsupported
from scripts.gpu_suite.sections import SECTIONS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)
def test_checks(section: Section) -> None:
    try:
        checks = list(section.check(Place(torch.device("cuda:0"), dry_run=False)))
    except Unsupported as reason:
        pytest.skip(str(reason))
    assert checks and not [check for check in checks if not check.passed]

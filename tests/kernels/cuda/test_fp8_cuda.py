"""The checks of the GPU suite as tests."""

import pytest
import torch

from scripts.gpu_suite.__main__ import SECTIONS
from scripts.gpu_suite.gemm import gluon_problem
from scripts.gpu_suite.harness import Place

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("section", SECTIONS)
def test_checks(section: str) -> None:
    checks = list(SECTIONS[section].check(Place(torch.device("cuda:0"), dry_run=False)))
    assert checks and not [check for check in checks if not check.passed]


def test_gluon() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs Hopper")
    assert gluon_problem("cuda") is None

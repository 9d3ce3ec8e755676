"""1,000 steps without a fault: no rank is called slow, and no alarm is raised."""

from pathlib import Path

import pytest

from tests import forks
from tests.faults.supervised import losses, supervised
from tests.faults.test_faults import words

pytestmark = pytest.mark.skipif(not forks.POSSIBLE, reason="Linux only")


@pytest.mark.slow
def test_1000_clean_steps(overrides: list[str], tmp_path: Path) -> None:
    """With the default limits; checkpoints are written beside 200 of the steps."""
    options = words(overrides, "--train.steps=1000", "--checkpoint.every=5")
    with supervised(tmp_path / "run", 2, options) as running:
        assert running.finish(1800) == 0, running.said[-3000:]
        said = running.said
    alarms = [line for line in said.splitlines() if "is slow" in line or "error" in line]
    print(f"\n{len(losses(tmp_path / 'run'))} clean steps of 2 ranks: {len(alarms)} false alarms")
    assert not alarms and "attempt" not in said and len(losses(tmp_path / "run")) == 1000

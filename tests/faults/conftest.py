"""Faults meet checkpoints that are written while training continues."""

import pytest


@pytest.fixture
def overrides(overrides: list[str]) -> list[str]:
    """Those of all tests, with asynchronous checkpoints."""
    return [*overrides, "--checkpoint.async_save=true"]

"""Engines for structured output, and the parameters of a request."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from serve.engine.core import EngineCore, EngineOptions
from serve.engine.loading import Export
from serve.engine.request import SamplingParams

Params = Callable[..., SamplingParams]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "number of legs": {"type": "integer", "minimum": 0, "maximum": 9},
        "quick brown fox": {"enum": ["jumps", "is lazy"]},
    },
    "required": ["name", "number of legs", "quick brown fox"],
}


@pytest.fixture(scope="module")
def core(export: Export) -> Iterator[EngineCore]:
    made = EngineCore(export, EngineOptions(kv_tokens=4096))
    yield made
    made.close()


@pytest.fixture(scope="module")
def plain_core(export: Export) -> Iterator[EngineCore]:
    """Without jump-forward; retracts, overlaps."""
    options = EngineOptions(kv_tokens=512, overlap="on", jump_forward="off")
    made = EngineCore(export, options)
    yield made
    made.close()


@pytest.fixture
def params() -> Params:
    return lambda **more: SamplingParams(**{"max_tokens": 150, "seed": 1, **more})

"""Serving of an exported folder, from Python (`serve.Engine`) or over HTTP (`python -m serve`).

The names below are imported at first use: parts of this package run without the libraries that a
tokenizer or a server needs.
"""

import importlib
from typing import TYPE_CHECKING, Any

from parallel.launch_environment import configure_libraries, disable_amx

configure_libraries()
disable_amx()

if TYPE_CHECKING:
    from serve.engine.core import EngineOptions
    from serve.engine.request import Output, RequestError, SamplingParams
    from serve.frontend.engine import Completion, Engine

__all__ = ["Completion", "Engine", "EngineOptions", "Output", "RequestError", "SamplingParams"]
_MODULES = {
    "Completion": "serve.frontend.engine",
    "Engine": "serve.frontend.engine",
    "EngineOptions": "serve.engine.core",
    "Output": "serve.engine.request",
    "RequestError": "serve.engine.request",
    "SamplingParams": "serve.engine.request",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'serve' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)

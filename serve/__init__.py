"""Serving of an exported folder, from Python (`serve.Engine`) or over HTTP (`python -m serve`)."""

import os

# torch reads it when it is loaded: OpenMP threads that wait by spinning stall on a shared machine
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from serve.engine.core import EngineOptions
from serve.engine.request import Output, RequestError, SamplingParams
from serve.frontend.engine import Completion, Engine

__all__ = ["Completion", "Engine", "EngineOptions", "Output", "RequestError", "SamplingParams"]

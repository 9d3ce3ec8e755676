"""Serving of an exported folder, from Python (`serve.Engine`) or over HTTP (`python -m serve`)."""

import os

# torch reads it when it is loaded: OpenMP threads that wait by spinning stall on a shared machine
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# torch's C++ logs a lost connection with its stack; lost ranks are reported in one line
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from serve.engine.core import EngineOptions
from serve.engine.request import Output, RequestError, SamplingParams
from serve.frontend.engine import Completion, Engine

__all__ = ["Completion", "Engine", "EngineOptions", "Output", "RequestError", "SamplingParams"]

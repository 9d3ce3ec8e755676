"""Facts about device and software that decide how figures are to be read."""

import contextlib
import importlib.util
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch.nn.attention import SDPBackend

from scripts.gpu_suite.harness import Place
from scripts.gpu_suite.runner.process import Send
from scripts.gpu_suite.sanitizer import installed

NO_DEVICE = "no CUDA device: nothing measured (--dry-run tries the suite itself on a CPU)"
PEERS = ("deep_gemm", "flash_attn", "liger_kernel", "transformer_engine")
ATTENTION = {
    "causal, GQA of Qwen3": (32, 4, 128, 128),
    "causal, MLA of DeepSeek-V3": (128, 128, 192, 128),
    "causal, GPT-OSS": (64, 8, 64, 64),
}
"""Query heads, key/value heads, width of keys, width of values."""


def facts(place: Place) -> Callable[[Send], None]:
    """Sends the facts, and prints nothing; the error is `NO_DEVICE` if there is no device."""

    def work(send: Send) -> None:
        if not place.dry_run and not torch.cuda.is_available():
            send({"error": NO_DEVICE})
            return
        send(_facts(place))

    return work


def _facts(place: Place) -> dict[str, Any]:
    cuda = place.device.type == "cuda"
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(place.device) if cuda else "CPU, dry run",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "commit": _commit(),
        "peers": [name for name in PEERS if importlib.util.find_spec(name)],
        "compute-sanitizer": installed(),
        "C compiler": shutil.which("cc") or shutil.which("gcc") or shutil.which("clang"),
        "attention": {name: sdpa_choice(place, *heads) for name, heads in ATTENTION.items()},
    }
    if cuda:
        properties = torch.cuda.get_device_properties(place.device)
        found["multiprocessors"] = properties.multi_processor_count
        found["GiB"] = round(properties.total_memory / 2**30, 1)
        found["capability"] = list(torch.cuda.get_device_capability(place.device))
    return found


def _commit() -> str:
    """Of the checkout; a copy of the files has none, and git may be missing."""
    with contextlib.suppress(OSError):
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent, capture_output=True, text=True,
        )  # fmt: skip
        return done.stdout.strip() or "unknown"
    return "unknown"


def sdpa_choice(place: Place, H: int, G: int, C: int, V: int) -> str:
    """The backend that torch's attention chooses for a training step in bf16."""
    options = {"device": place.device, "dtype": torch.bfloat16, "requires_grad": True}
    q = torch.zeros(1, H, 512, C, **options)  # type: ignore[call-overload]
    k = torch.zeros(1, G, 512, C, **options)  # type: ignore[call-overload]
    v = torch.zeros(1, G, 512, V, **options)  # type: ignore[call-overload]
    number = torch._fused_sdp_choice(q, k, v, None, 0.0, True, scale=None, enable_gqa=H != G)
    return SDPBackend(number).name

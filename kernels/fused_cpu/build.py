"""Compiles the C++ of this package if a compiler is present, once per source, torch and CPU.

It is plain C++ without torch's headers, which compiles in 3 seconds instead of a minute. The
library is renamed into the user's cache folder, so two processes may compile at the same time.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

log = logging.getLogger(__name__)
_SOURCES = Path(__file__).parent
_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-march=native", "-fopenmp", "-shared", "-fPIC"]
_MAX_SECONDS = 120


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library; None if this CPU or machine cannot build or run it (the log has
    why)."""
    if not torch.cpu._is_avx512_bf16_supported():
        return None
    if not _adds_in_order():
        log.warning(
            "computed by torch's operations: oneDNN adds in another order than kernels.fused_cpu, "
            "as it does with AMX; start with ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16"
        )
        return None
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        log.info("no C++ compiler: serving computes with torch's operations")
        return None
    try:
        return ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        log.warning("the C++ of kernels.fused_cpu cannot be used: %s", str(reason).strip()[-300:])
        return None


def _adds_in_order() -> bool:
    """Whether torch's bf16 products add in the order of `product.h`, one pair after another. AMX
    adds even and odd places separately, and only some results show it after their rounding."""
    huge = 2.0**60
    row = torch.tensor([huge, 0, 0, 1, -huge, 0, 0, 0], dtype=torch.bfloat16)
    product = F.linear(row.repeat(8, 4), torch.ones(64, 32, dtype=torch.bfloat16))
    return not product.any()  # each 1 is lost in `huge`


def _compiled(compiler: str) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "phalanx"
    target = folder / f"fused_cpu-{_version(compiler)}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    libraries = Path(torch.__file__).parent / "lib"
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "made.so"
        subprocess.run(
            [
                compiler, *_FLAGS, str(_SOURCES / "block.cpp"), "-o", str(made),
                f"-L{libraries}", "-ltorch_cpu", f"-Wl,-rpath,{libraries}",
            ],
            check=True, capture_output=True, text=True, timeout=_MAX_SECONDS,
        )  # fmt: skip
        os.replace(made, target)
    return target


def _version(compiler: str) -> str:
    """A hash of everything the library depends on."""
    digest = hashlib.sha256(f"{compiler} {_FLAGS} {torch.__version__} {torch.__file__}".encode())
    for path in sorted(_SOURCES.glob("*.[ch]*")):
        digest.update(path.read_bytes())
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        digest.update(next((x for x in lines if x.startswith("flags")), "").encode())
    except OSError:
        pass
    return digest.hexdigest()[:16]

"""Triton kernels compiled for absent GPUs.

`with offline("cuda", 90) as builds:` replaces Triton's driver: a launch compiles for that target,
with the launcher's own arguments, options and heuristics, and then does nothing. Tensors may be on
the CPU. The builds contain properties that are not visible from Python: registers, spills, shared
memory, and whether tensor cores (QGMMA, UTCQMMA, MFMA) and TMA (UTMALDG) are actually in the
machine code. The tools that read it (cuobjdump, nvdisasm, ptxas) are part of Triton. Speed is not
estimated.

It works on Triton 3.6 and 3.9, and not if TRITON_INTERPRET is set.
"""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from triton.runtime.jit import JITFunction

SHARED_BYTES: dict[int | str, int] = {
    80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376, "gfx942": 65536, "gfx950": 163840,
}  # fmt: skip
"""Maximum shared memory of one program, by compute capability or gfx name."""
_N_SM = 132
_TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
_INSTRUCTIONS = ("QGMMA", "HGMMA", "HMMA", "UTCQMMA", "UTCHMMA", "UTMALDG", "LDGSTS")


@dataclass
class Build:
    """One kernel as compiled."""

    name: str
    kernel: Any = field(repr=False)
    """Triton's compiled kernel."""
    registers: int = 0
    """Per thread; on AMD vector registers."""
    spilled: int = 0
    """Bytes stored and loaded again for lack of registers; on AMD the registers concerned."""
    shared: int = 0
    """Bytes per program."""

    @cached_property
    def code(self) -> str:
        """Machine code as text. NVIDIA's reader takes 0.3 s; with an analysis of the flow of data,
        which -ndf leaves out, 0.4."""
        if "cubin" not in self.kernel.asm:
            return str(self.kernel.asm["amdgcn"])
        return _tool("nvdisasm", "-ndf", "-c", content=self.kernel.asm["cubin"])

    @cached_property
    def instructions(self) -> dict[str, int]:
        """Counts of relevant instructions in the machine code."""
        if "cubin" not in self.kernel.asm:
            return {"MFMA": len(re.findall(r"\bv_mfma", self.code))}
        found = {name: len(re.findall(rf"\b{name}\b", self.code)) for name in _INSTRUCTIONS}
        return {name: n for name, n in found.items() if n}


@contextlib.contextmanager
def offline(backend: str, arch: int | str) -> Iterator[list[Build]]:
    """Compile the kernels launched in this context; the list is filled at the end.

    backend: "cuda" or "hip"; arch: compute capability (90) or gfx name ("gfx942").
    """
    builds: list[Build] = []
    shipped = JITFunction.run

    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        kernel = shipped(self, *arguments, **options)
        if all(build.kernel is not kernel for build in builds):
            builds.append(Build(self.fn.__name__.lstrip("_"), kernel))
        return kernel

    previous = driver._active
    driver.set_active(_Driver(backend, arch))
    JITFunction.run = run
    try:
        yield builds
    finally:
        JITFunction.run, driver._active = shipped, previous
    for build in builds:
        _inspect(build)


def _inspect(build: Build) -> None:
    build.shared = build.kernel.metadata.shared
    if "cubin" in build.kernel.asm:
        _inspect_cubin(build)
        return
    text = build.kernel.asm["amdgcn"]
    counts = {name: int(n) for name, n in re.findall(r"\.((?:vgpr|sgpr)\w*_count):\s*(\d+)", text)}
    build.registers = counts["vgpr_count"]
    build.spilled = counts["vgpr_spill_count"] + counts["sgpr_spill_count"]


def _inspect_cubin(build: Build) -> None:
    cubin = _tool("cuobjdump", "-res-usage", content=build.kernel.asm["cubin"])
    build.registers = int(re.findall(r"REG:(\d+)", cubin)[0])
    if re.search(r" STACK:0 .* LOCAL:0 ", cubin):
        return  # spilled registers are in local memory, and assembling again takes 0.1 s
    ptx = build.kernel.asm["ptx"]
    target = re.findall(r"\.target ([\w]+)", ptx)[0]
    ptxas = get_ptxas(build.kernel.metadata.target.arch).path
    verbose = _tool(ptxas, "-v", f"--gpu-name={target}", "-o", "/dev/null", content=ptx.encode())
    spills = re.findall(r"(\d+) bytes spill", verbose)
    assert spills, f"ptxas reports no spills at all: {verbose}"
    build.spilled = sum(map(int, spills))


def _tool(name: str, *options: str, content: bytes) -> str:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        done = subprocess.run(
            [str(_TOOLS / name), *options, file.name], capture_output=True, text=True, check=True
        )
    return done.stdout + done.stderr


class _Utilities:
    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_device_properties(self, device: object) -> dict[str, Any]:
        return {
            "max_shared_mem": SHARED_BYTES[self.target.arch],
            "multiprocessor_count": _N_SM,
            "warpSize": self.target.warp_size,
            "max_num_regs": 65536,
            "arch": str(self.target.arch),
        }

    def load_binary(self, *arguments: object) -> tuple[object, object, int, int, int]:
        return object(), object(), 0, 0, 1024


class _Launcher:
    def __init__(self, source: object, metadata: object) -> None:
        pass

    def __call__(self, *arguments: object, **options: object) -> None:
        pass


class _Driver(DriverBase):
    def __init__(self, backend: str, arch: int | str) -> None:
        self.target = GPUTarget(backend, arch, 64 if backend == "hip" else 32)
        self.utils = _Utilities(self.target)
        self.launcher_cls = _Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, type_: str) -> str:
        return type_

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> tuple[str, int | str]:
        return self.target.backend, self.target.arch  # kernels are cached per device

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> None:
        raise NotImplementedError("nothing runs offline")

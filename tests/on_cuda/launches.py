"""Launches of Triton kernels on tensors without data: their arguments are checked as Triton and the
GPU would, and the kernel is compiled for the GPU if required."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from scripts.kernel_table.offline import Build, offline
from tests.on_cuda.device import CUDA, Fault, OnDevice, place_of

_ALIGNED = 16
"""Bytes; of the address and of all strides but the last of an operand that TMA reads."""


class _Kernel:
    """A kernel that is not compiled."""

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *_: Any) -> None:
        return None

    function = packed_metadata = None


@contextmanager
def checked_launches(compile: bool) -> Iterator[tuple[Counter[str], list[Build]]]:
    """Context in which launches are checked for compute capability 9.0; yields how often every
    kernel was launched, and, if `compile`, at the end what was compiled.

    Without compilation Triton still binds all arguments, and so reports an unknown or missing one
    and a wrong type of a constant.
    """
    launched: Counter[str] = Counter()
    bindings: list[tuple[dict[Any, Any], Any]] = []

    def bound(self: Any, key: Any, signature: Any, *_: Any) -> Any:
        kernels = self.device_caches[("cuda", 90)][0]
        kernels[key] = made = _Kernel()
        bindings.append((kernels, key))
        return made

    with offline("cuda", 90) as builds:
        inner = JITFunction.run

        def run(self: Any, *arguments: Any, **options: Any) -> Any:
            launched[self.fn.__name__] += 1
            for name, argument in zip(self.arg_names, arguments, strict=False):
                _check(f"{self.fn.__name__}({name})", argument)
            return inner(self, *arguments, **options)

        with patch.object(JITFunction, "run", run):
            if compile:
                yield launched, builds
                return
            with patch.object(JITFunction, "_do_compile", bound):
                try:
                    yield launched, []
                finally:
                    builds.clear()
                    for kernels, key in bindings:  # others may compile them
                        kernels.pop(key, None)


def _check(name: str, argument: Any) -> None:
    if isinstance(argument, TensorDescriptor):
        base: Any = argument.base
        _check(name, base)
        strides = [stride * base.itemsize for stride in argument.strides[:-1]]
        if base.data_ptr() % _ALIGNED or any(stride % _ALIGNED for stride in strides):
            raise Fault(f"{place_of()}: {name}: TMA cannot read strides {strides}")
        if argument.strides[-1] != 1:
            raise Fault(f"{place_of()}: {name}: TMA needs contiguous rows")
    elif isinstance(argument, Tensor):
        if not isinstance(argument, OnDevice) or argument.place != CUDA:
            where = argument.place if isinstance(argument, OnDevice) else argument.device
            raise Fault(f"{place_of()}: {name}: a kernel cannot read memory of {where}")
        if argument.dtype == torch.float64:
            raise Fault(f"{place_of()}: {name}: fp64, which no kernel of ours computes in")

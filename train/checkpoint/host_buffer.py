"""Memory that a rank and its writer process share, for a snapshot of the rank's tensors.

The snapshot is the image of the file that the writer will write. The memory is allocated once and
used again for every checkpoint. On CUDA it is pinned, so copies from the device are fast.
"""

import mmap
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from train.checkpoint.storage.layout import FileLayout


class HostBuffer:
    """`size` bytes of shared memory. Raises OSError if there is not so much memory."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self.descriptor = _anonymous_file()
        try:
            # allocates every page now: a lack of memory is an error here, not a signal later
            os.posix_fallocate(self.descriptor, 0, size)
            self._map = mmap.mmap(self.descriptor, size)
        except OSError:
            os.close(self.descriptor)
            raise
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._pinned = False
        if device.type == "cuda":
            done = torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), size, 0)
            self._pinned = int(done) == 0  # otherwise copies are slower

    def fill(self, layout: FileLayout, tensors: Mapping[str, Tensor]) -> None:
        """Copy the image of a file: its header and `tensors`, this rank's data by name. Returns
        when the data is in host memory."""
        header = torch.frombuffer(bytearray(layout.header), dtype=torch.uint8)
        self._bytes[: len(layout.header)] = header
        is_on_device = False
        for name, (start, end) in layout.places.items():
            source = raw_bytes(tensors[name])
            is_on_device |= source.is_cuda
            self._bytes[start:end].copy_(source, non_blocking=self._pinned)
        if is_on_device:
            torch.cuda.synchronize()

    def close(self) -> None:
        """Free the memory."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())
        del self._bytes
        self._map.close()
        os.close(self.descriptor)


def raw_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor as a vector, without a copy if it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def available_host_memory() -> int | None:
    """Bytes that can be allocated without swapping; None if the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    values = dict(line.split(":", 1) for line in lines)
    return int(values["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in values else None


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("checkpoint")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())

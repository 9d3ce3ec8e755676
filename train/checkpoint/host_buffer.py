"""Memory that a rank and its writer process share, for a snapshot of the rank's tensors.

The snapshot is the image of the file that the writer will write. The memory is allocated once and
used again for every checkpoint. On CUDA it is pinned, so copies from the device are fast.
"""

import errno
import mmap
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from train.checkpoint.storage.layout import FileLayout


class HostBuffer:
    """`size` bytes of shared memory.

    Raises OSError if there is not so much memory. The system itself does not refuse it: it ends
    processes when the memory is full, so the available memory is read first.
    """

    def __init__(self, size: int, device: torch.device, n_buffers: int = 1) -> None:
        """n_buffers: buffers of this size that processes of this host allocate at this time."""
        self.size = size
        available = available_host_memory()
        if available is not None and size * n_buffers > available:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        self.descriptor = _anonymous_file()
        try:
            # allocates every page now, so that the first copy is not slower than later ones
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
    """Bytes that can be allocated without swapping, also within the limits of this process's
    control groups (containers, jobs); None if the system does not report it."""
    found = []
    with suppress(OSError, KeyError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = dict(line.split(":", 1) for line in lines)["MemAvailable"].split()[0]
        found.append(int(kib) * 1024)
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                found += _left_in_group(Path("/sys/fs/cgroup"), path, "max", "current", "")
            elif "memory" in controllers.split(","):
                root, names = Path("/sys/fs/cgroup/memory"), ("limit_in_bytes", "usage_in_bytes")
                found += _left_in_group(root, path, *names, "total_")
    return min(found, default=None)


def _left_in_group(root: Path, path: str, limit: str, used: str, prefix: str) -> list[int]:
    """Bytes up to the limit of a control group, in a list; empty if it has none. Cached files are
    given up when memory is needed, so they do not count as used."""
    folder = root / path.lstrip("/")
    try:
        most, now = (int((folder / f"memory.{name}").read_text()) for name in (limit, used))
        lines = (folder / "memory.stat").read_text().splitlines()
        stat = {name: int(value) for name, value in (line.split() for line in lines)}
        cached = stat[f"{prefix}inactive_file"] + stat[f"{prefix}active_file"]
    except (OSError, ValueError, KeyError):  # `max` is no number
        return []
    return [most - now + cached]


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("checkpoint")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())

"""Settings of glibc's malloc for a process whose tensors are in the CPU's memory.

This module uses only the standard library: call `restart_without_thread_cache` first in a program.
"""

import ctypes
import os
import sys

_TUNABLES, _NO_THREAD_CACHE = "GLIBC_TUNABLES", "glibc.malloc.tcache_count=0"
_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for reuse.

    By default every large tensor is newly mapped by the kernel, which clears its pages: 12,000 page
    faults per step of the demo, a tenth of its time. Without glibc this function does nothing.
    """
    if not _is_glibc():
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # constants of mallopt(3)
    libc = ctypes.CDLL("libc.so.6")
    for parameter, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**26)):
        libc.mallopt(parameter, value)


def restart_without_thread_cache() -> None:
    """Run this command again, in the same process, with glibc's thread cache off.

    That cache keeps small freed pieces, including those between the holes of large freed tensors.
    Then the holes never merge, and no aligned tensor fits into a hole of its own size: a training
    with experts 3,584 wide grew by 0.22 GiB per step until memory was full, and does not grow
    without the cache. glibc reads the setting only when a process starts. This function does
    nothing if the setting is already present, with another C library, or if the tensors are on a
    GPU.
    """
    given = os.environ.get(_TUNABLES, "")
    if "glibc.malloc.tcache_count" in given or not _is_glibc() or _has_gpu():
        return
    os.environ[_TUNABLES] = f"{given}:{_NO_THREAD_CACHE}" if given else _NO_THREAD_CACHE
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _is_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, OSError, ValueError):  # not Unix, or another C library
        return False


def _has_gpu() -> bool:
    return any(os.path.exists(driver) for driver in _GPU_DRIVERS)

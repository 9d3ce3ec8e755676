"""Two hosts with a slow link between them, on one Linux machine, for network measurements.

Each host is a network namespace; the link is this process, which forwards packets from one TUN
device to another, each after its delay and no faster than the rate (as `tc netem` does, which
many kernels lack). Needs root, `ip` and /dev/net/tun.
"""

import ctypes
import fcntl
import os
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress

ADDRESSES = ("10.77.0.1", "10.77.0.2")
INTERFACE = "cable"
_TUNSETIFF, _TUN_WITHOUT_HEADER, _NEWNET = 0x400454CA, 0x1001, 0x40000000
_QUEUE = 4000
"""Maximum number of waiting packets; further ones are lost, as on a real link."""


@contextmanager
def two_hosts(delay_ms: float, mbit: float) -> Iterator[tuple[str, str]]:
    """The names of two namespaces with a link between them; removed at the end."""
    names = (f"host-a-{os.getpid()}", f"host-b-{os.getpid()}")
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
            subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        command = [
            sys.executable,
            "-m",
            "scripts.bench_dispatch.slow_link",
            *names,
            str(delay_ms),
            str(mbit),
        ]
        cable = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert cable.stdout is not None and cable.stdout.readline() == "up\n", "no cable"
        yield names
    finally:
        with suppress(NameError):
            cable.kill()
            cable.wait()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def _end_of_cable(namespace: str, address: str, peer: str) -> int:
    """A TUN device in a namespace, as a file."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    assert libc.setns(os.open(f"/run/netns/{namespace}", os.O_RDONLY), _NEWNET) == 0
    device = os.open("/dev/net/tun", os.O_RDWR)
    request = struct.pack("16sH22x", INTERFACE.encode(), _TUN_WITHOUT_HEADER)
    fcntl.ioctl(device, _TUNSETIFF, request)
    address_of = ["ip", "addr", "add", address, "peer", peer, "dev", INTERFACE]
    subprocess.run(address_of, check=True)
    size = ["mtu", "60000", "txqueuelen", "2000"]
    subprocess.run(["ip", "link", "set", INTERFACE, *size, "up"], check=True)
    assert libc.setns(home, _NEWNET) == 0
    return device


def _carry(source: int, target: int, delay: float, bytes_per_s: float) -> None:
    """Forward packets forever, in one direction of the link."""
    waiting: deque[tuple[float, bytes]] = deque()
    ready = threading.Condition()

    def deliver() -> None:
        while True:
            with ready:
                while not waiting:
                    ready.wait()
                due, packet = waiting.popleft()
            time.sleep(max(due - time.monotonic(), 0))
            os.write(target, packet)

    threading.Thread(target=deliver, daemon=True).start()
    free_at = 0.0
    while True:
        packet = os.read(source, 65536)
        if len(waiting) < _QUEUE:
            free_at = max(free_at, time.monotonic()) + len(packet) / bytes_per_s
            with ready:
                waiting.append((free_at + delay, packet))
                ready.notify()


def main(first: str, second: str, delay_ms: float, mbit: float) -> None:
    """Run the link between two namespaces."""
    ends = _end_of_cable(first, *ADDRESSES), _end_of_cable(second, *ADDRESSES[::-1])
    how = delay_ms / 1e3, mbit * 1e6 / 8
    threading.Thread(target=_carry, args=(*ends, *how), daemon=True).start()
    print("up", flush=True)
    _carry(*ends[::-1], *how)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))

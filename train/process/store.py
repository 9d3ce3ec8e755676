"""`python -m train.process.store PORT`: the store through which the ranks of one attempt meet.

It has a process of its own, so that the ranks can still find out what happened when rank 0 is
stopped or killed. The supervisor starts and ends it.
"""

import ctypes
import os
import signal
import sys
from contextlib import suppress

from torch.distributed import TCPStore

from configs.health.heartbeat import SUPERVISOR_VARIABLE

_PR_SET_PDEATHSIG = 1


def main(port: int) -> None:
    """Serve until a signal or the end of the supervisor."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C on the terminal is for the ranks
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[SUPERVISOR_VARIABLE]):
        return
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    while store.port:
        signal.pause()


if __name__ == "__main__":
    main(int(sys.argv[1]))

"""Ends a process of several ranks with one line, whatever the other ranks are doing.

The launcher stops all ranks as soon as one exits. Ranks that wait in a collective cannot leave it,
and destructors of the process group would wait for lost ranks: so these functions end the process
without them.
"""

import os
import signal
import sys
import time
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:  # `fail` is used before torch is imported
    from parallel.ranks import Ranks


def fail(rank: int, line: str, code: int) -> int:
    """Print the line once and end the process, or return `code` if no launcher started it.

    Other ranks give rank 0 time to print first, which usually has the same error; if it prints
    nothing, they do.
    """
    if rank:
        # sent by the launcher after rank 0 has printed
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
        line = f"rank {rank}: {line}"
    print(line, file=sys.stderr, flush=True)
    if "RANK" in os.environ:
        if not rank and os.environ.get("WORLD_SIZE") != "1":
            time.sleep(3)  # the store may end with this process: the others read the error from it
        os._exit(code)  # other ranks may wait in a collective: do not wait for them
    return code


def end_if_lost(ranks: "Ranks", what: str, advice: str) -> None:
    """End the process if ranks do not answer, after a collective has failed; one rank prints a
    line. Returns if all answer.

    what: the name of the run, before the line. advice: what the user can do, after it.
    """
    monitor = ranks.rank_monitor
    absent = None if monitor is None else monitor.absent()
    if monitor is None or absent is None:
        return
    if monitor.is_first_to_tell():
        print(
            f"error: {what}: {absent} does not answer any more: it failed (its own line is above "
            f"then), was killed, ran out of memory, or its host is lost; the other ranks stop; "
            f"{advice}",
            file=sys.stderr,
            flush=True,
        )
    os._exit(1)


def end(ranks: "Ranks", line: str) -> NoReturn:
    """End the process because of an error of this rank, which the others cannot know."""
    print(f"error: rank {ranks.rank}: {line}", file=sys.stderr, flush=True)
    os._exit(1)

"""Pickles written by hand that run a command when they are loaded: for tests that nothing loads
them. No test can show here that they work, because nothing of ours imports pickle; this does, and
creates a file `executed` for each (tried with Python 3.11 on 2026-11-29):

    import pickle
    from pathlib import Path
    from tests.faults.pickles import pickles
    for raw in pickles(Path("executed")).values():
        pickle.loads(raw)
"""

import struct
from pathlib import Path


def pickles(marker: Path) -> dict[str, bytes]:
    """Pickles of two protocols that create the file `marker`: GLOBAL os.system, one string in a
    tuple, REDUCE, STOP."""
    command = f"touch {marker}".encode()
    return {
        "protocol 0": b"cos\nsystem\n(S'" + command + b"'\ntR.",
        "protocol 2": b"\x80\x02cos\nsystem\nX"
        + struct.pack("<I", len(command))
        + command
        + b"\x85R.",
    }

"""A process that has imported the trainer and forks ranks, in milliseconds instead of the seconds
of those imports. The supervisor (`launch/supervisor`) starts it once, on hosts without a GPU.

    {"words": ["train", ...], "env": {...}, "out": FILE, "err": FILE}  ->  process id

One line of JSON per rank on standard input, one answer on standard output. A rank becomes a child
of the supervisor, which has declared itself the reaper of its descendants (Linux).
"""

import ctypes
import gc
import importlib
import json
import os
import random
import runpy
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from configs.health.heartbeat import SUPERVISOR_VARIABLE
from parallel.allocator import restart_without_thread_cache
from parallel.launch_environment import configure_libraries

_MODULES = ("train.trainer", "torch._dynamo", "torch.utils.tensorboard")
_KEPT = ("GLIBC_TUNABLES", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "TORCH_CPP_LOG_LEVEL")
_PATIENCE_S = 10.0
_PR_SET_PDEATHSIG = 1
_FIRST = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_")
"""Variables that are shown first, since the memory may be too small for all."""


def serve() -> None:
    """Answer until standard input ends, or the supervisor does, also while modules are imported."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # not of the ranks: see prctl(2)
    if os.getppid() != int(os.environ[SUPERVISOR_VARIABLE]):  # it has ended already
        return
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for name in _MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # keeps these pages shared: a rank's garbage collector does not touch them
    if threading.active_count() > 1:
        raise SystemExit("an import has started a thread, which a fork would lose")
    print("ready", file=answers)
    for line in sys.stdin:
        print(_fork(json.loads(line)), file=answers)
    os._exit(0)  # some libraries report objects that are left at the end


def _fork(request: dict[str, Any]) -> int:
    """Start a rank, as the child of a process that ends at once; returns its process id."""
    reading, writing = os.pipe()
    middle = os.fork()
    if not middle:
        rank = os.fork()
        if rank:
            os.write(writing, str(rank).encode())
            os._exit(0)
        os.close(reading)
        os.close(writing)
        _become(request)
    os.close(writing)
    with os.fdopen(reading) as answer:
        pid = int(answer.read())
    os.waitpid(middle, 0)
    return pid


def _become(request: dict[str, Any]) -> NoReturn:
    """Run the rank's program in this process, and end."""
    supervisor = int(request["env"][SUPERVISOR_VARIABLE])
    deadline = time.monotonic() + _PATIENCE_S
    while os.getppid() != supervisor and time.monotonic() < deadline:
        time.sleep(0.001)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    for number, path in ((1, request["out"]), (2, request["err"])):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(handle, number)
        os.close(handle)
    # variables that this process was started with: a rank that misses them starts Python again
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    os.environ.clear()
    os.environ.update(request["env"] | kept)
    random.seed()
    sys.modules["numpy"].random.seed()
    module, *arguments = request["words"]
    sys.argv = [module, *arguments]
    _show_as([sys.executable, "-m", *request["words"]])
    code: object = 0
    try:
        # it runs as the main program, not as the imported module
        for name in (module, f"{module}.__main__"):
            if name in sys.modules and not hasattr(sys.modules[name], "__path__"):
                del sys.modules[name]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def _show_as(command: list[str]) -> None:
    """Let `ps` and /proc show this process with the command and the environment of its rank.

    The kernel reads both from the memory in which it put those of the server; Python has copies.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    places = [int(field) for field in fields[45:49]]
    environment = [f"{name}={value}" for name, value in os.environ.items()]
    environment.sort(key=lambda text: not text.startswith(_FIRST))
    for start, end, words in (
        (places[0], places[1], command), (places[2], places[3], environment),
    ):  # fmt: skip
        text = b"".join(os.fsencode(word) + b"\0" for word in words)[: end - start - 1]
        ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


if __name__ == "__main__":
    restart_without_thread_cache()
    configure_libraries()
    serve()

"""A process that has imported the modules of our programs and forks a copy of itself for each
program.

`python -P tests/template.py SOCKET MODULE...` imports the modules once. SOCKET is the file
descriptor of a listening socket. Any number of clients connect to it; each sends lines of JSON, and
gets one line for each:

    {"start": {"words": [...], "env": {...}, "cwd": ..., "out": FILE, "err": FILE}} -> {"pid": N}
    {"reap": N} -> {"code": exit code of that child, negative for a signal, "seconds": its CPU time}

`words` are the arguments of a Python interpreter: `-m MODULE ...`, `-c CODE ...` or `FILE ...`,
each optionally after `-P`. A child has its own standard streams, environment, signals, process
group and exit code, and ends like any Python process; only its modules were imported before. A fork
copies one thread, so the template refuses to serve with several threads. The children of a client
that disconnects are killed. The template ends when it has had no client for a while.
"""

import atexit
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NoReturn

IDLE_S = 5.0


@dataclass
class Client:
    connection: socket.socket
    requests: BinaryIO
    children: set[int] = field(default_factory=set)

    def answer(self, **values: object) -> None:
        self.connection.sendall(json.dumps(values).encode() + b"\n")


def main(listening: int, modules: list[str]) -> None:
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    for name in modules:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would be lost in every child"
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False  # those of torch unregister its operators, 0.08 s in every child
    gc.collect()
    gc.set_threshold(20_000)  # most programs are short
    gc.freeze()  # keeps these pages shared: a child's garbage collector does not touch them
    program = serve(socket.socket(fileno=listening))
    run_to_end(program or (lambda: None))


def serve(listener: socket.socket) -> Callable[[], None] | None:
    """Answer until there is no client; in a child, return the program to run."""
    clients: dict[int, Client] = {}
    own = listener.fileno()
    while ready := select.select([own, *clients], [], [], None if clients else IDLE_S)[0]:
        for one in ready:
            if one == own:
                connection, _ = listener.accept()
                client = Client(connection, connection.makefile("rb"))
                clients[connection.fileno()] = client
                continue
            client = clients[one]
            line = client.requests.readline()
            if not line:
                del clients[one]
                disconnect(client)
                continue
            program = answer(client, json.loads(line))
            if program is not None:
                listener.close()
                for other in clients.values():
                    other.requests.close()
                    other.connection.close()
                return program
    return None


def answer(client: Client, request: dict[str, Any]) -> Callable[[], None] | None:
    """Answer a request; in a child, return the program to run."""
    if "start" in request:
        pid = os.fork()
        if not pid:
            return partial(become, **request["start"])
        client.children.add(pid)
        client.answer(pid=pid)
        return None
    _, status, used = os.wait4(request["reap"], 0)
    client.children.remove(request["reap"])
    client.answer(code=os.waitstatus_to_exitcode(status), seconds=used.ru_utime + used.ru_stime)
    return None


def disconnect(client: Client) -> None:
    for pid in client.children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    client.requests.close()
    client.connection.close()


def run_to_end(program: Callable[[], None]) -> NoReturn:
    """Run it and exit as Python does, but without tearing down every module, which takes 0.2 s."""
    code: object = None
    try:
        program()
    except SystemExit as ended:
        code = ended.code
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code or 0)


def become(words: list[str], env: dict[str, str], cwd: str, out: str, err: str) -> None:
    """Run a program as the main program of this process."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, path in ((1, out), (2, err)):
        with open(path, "ab", buffering=0) as file:  # several ranks append to one file
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    # random values that a separate process would draw itself
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    isolated = words[0] == "-P"
    option, *rest = words[isolated:]
    if option == "-m":
        folder, sys.argv = cwd, rest
    elif option == "-c":
        folder, sys.argv = "", ["-c", *rest[1:]]
    else:
        folder, sys.argv = str(Path(option).resolve().parent), [option, *rest]
    if not isolated:
        sys.path.insert(0, folder)
    if option == "-m":
        sys.modules.pop(rest[0], None)  # it runs as __main__, not as the imported module
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    module = ModuleType("__main__")
    sys.modules["__main__"] = module
    if option != "-c":
        module.__file__ = option
    source, name = (rest[0], "<string>") if option == "-c" else (Path(option).read_text(), option)
    exec(compile(source, name, "exec"), module.__dict__)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])

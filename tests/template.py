"""A process that has imported the modules of our programs and forks a copy of itself for each
program.

`python -P tests/template.py MODULE...` imports the modules once. Then it answers one line of JSON
per line on its standard input:

    {"start": {"words": [...], "env": {...}, "cwd": ..., "out": FILE, "err": FILE}} -> {"pid": N}
    {"reap": N} -> {"code": exit code of that child, negative for a signal}

`words` are the arguments of a Python interpreter: `-m MODULE ...`, `-c CODE ...` or `FILE ...`,
each optionally after `-P`. A child has its own standard streams, environment, signals, process
group and exit code, and ends like any Python process; only its modules were imported before. A fork
copies one thread, so the template refuses to serve with several threads. When its input ends, it
kills the remaining children.
"""

import atexit
import gc
import importlib
import json
import os
import random
import runpy
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, NoReturn


def main(modules: list[str]) -> None:
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)  # output of an import is not an answer
    for name in modules:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would be lost in every child"
    gc.collect()
    gc.freeze()  # keeps these pages shared: a child's garbage collector does not touch them
    program = serve(requests, answers)
    run_to_end(program or (lambda: None))


def serve(requests: BinaryIO, answers: BinaryIO) -> Callable[[], None] | None:
    """Answer until the input ends; in a child, return the program to run."""
    children: set[int] = set()
    for line in iter(requests.readline, b""):
        request = json.loads(line)
        if "start" in request:
            pid = os.fork()
            if not pid:
                requests.close()
                answers.close()
                return partial(become, **request["start"])
            children.add(pid)
            answer = {"pid": pid}
        else:
            _, status = os.waitpid(request["reap"], 0)
            children.remove(request["reap"])
            answer = {"code": os.waitstatus_to_exitcode(status)}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    return None


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
    main(sys.argv[1:])

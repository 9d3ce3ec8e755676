"""Runs programs in forks of template processes, in milliseconds instead of the seconds of their
imports. All processes of a test session share its templates.

`forked` is a replacement for `subprocess.run` of `python ARGUMENTS` or torchrun: same arguments,
environment, streams, exit code and signals. Two things differ, and tests of these start real
processes: modules are not imported again, and torchrun itself is not run. Even and odd ranks are
forked from two templates, so that the iteration order of sets of strings differs between ranks, as
it does between separate processes.
"""

import hashlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

POSSIBLE = hasattr(os, "pidfd_open") and Path("/proc/self/task").is_dir()
GRACE_S = 15.0
"""Time from SIGTERM to SIGKILL for the remaining ranks after one has failed."""
HERE = Path(__file__).resolve().parent
TUNABLES = {
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""Variables that the trainer would otherwise restart itself with, or set before importing torch."""
OURS = (
    "tests.parallel.mesh.checkpoint_run", "tests.serve.ranks.mesh_run", "train.check",
    "train.trainer", "scripts.validate", "serve.generate", "serve.api.app",
    # modules that these import lazily, and those of their dependencies
    "torch._dynamo", "torch.utils.tensorboard", "tests.without_pictures", "torch.profiler",
    "torch.distributed._tools.fsdp2_mem_tracker", "numpy.ma", "numpy.ctypeslib", "encodings.idna",
    "tomli", "tomli_w",
    "train.process.log_streams", "train.process.deterministic", "train.report.event_file",
)  # fmt: skip
_FAMILIES = "deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss", "llama4", "mixtral", "qwen3_moe"
THEIRS = (
    "numpy", "safetensors.torch", "transformers.models.auto.modeling_auto",
    *(f"transformers.models.{family}.modeling_{family}" for family in _FAMILIES),
)  # fmt: skip
TRITON = (
    "pytest",
    "kernels.mlp.mlp_fp8",
    "kernels.grouped_gemm.grouped_gemm_triton",
    "kernels.gemm.gemm_fp8_triton",
    "triton.runtime.interpreter",
    "torch._dynamo",
)
TORCH = ("torch.distributed.tensor", "torch.distributed.fsdp", "torch._dynamo")
_attempts = count(1)
_spent: list[float] = []


SESSION = "TEST_SESSION"
"""Environment variable that is equal in all processes of a test session."""


class Template:
    """A connection to a process of `tests/template.py`. Threads may use it at the same time."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._answers = connection.makefile("rb")

    def start(self, words: list[str], env: dict[str, str], cwd: Path, out: Path, err: Path) -> int:
        """Start a program, which appends to the files `out` and `err`; returns its process id."""
        place = {"cwd": str(cwd), "out": str(out), "err": str(err)}
        return int(self._ask(start={"words": words, "env": env} | place)["pid"])

    def reap(self, pid: int) -> tuple[int, float]:
        """Wait for a program to end; returns its exit code, negative for a signal, and its CPU
        seconds."""
        ended = self._ask(reap=pid)
        return int(ended["code"]), float(ended["seconds"])

    def _ask(self, **request: Any) -> Any:
        with self._lock:
            self._connection.sendall(json.dumps(request).encode() + b"\n")
            answer = self._answers.readline()
        assert answer, "the template has ended"
        return json.loads(answer)


@cache
def template(modules: tuple[str, ...], odd: bool, more: tuple[tuple[str, str], ...]) -> Template:
    """The template for these modules; the first process of the session that needs it starts it.
    more: environment variables during its imports."""
    session = os.environ.setdefault(SESSION, str(os.getpid()))
    words = json.dumps([sys.executable, str(HERE), session, modules, odd, more])
    address = "\0phalanx-tests-" + hashlib.sha256(words.encode()).hexdigest()
    deadline = time.monotonic() + 60
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.bind(address)
        except OSError:  # it exists
            try:
                connection.connect(address)
                return Template(connection)
            except OSError:  # its process just begins or ends
                assert time.monotonic() < deadline
                time.sleep(0.01)
                continue
        with connection as listener:
            listener.listen(64)
            _spawn(listener, modules, odd, more)


def _spawn(
    listener: socket.socket, modules: tuple[str, ...], odd: bool, more: tuple[tuple[str, str], ...]
) -> None:
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    number = listener.fileno()
    subprocess.Popen(
        [sys.executable, "-P", HERE / "template.py", str(number), *modules], cwd=HERE.parent,
        env=os.environ | threads | TUNABLES | {
            "PYTHONPATH": str(HERE.parent), "PYTHONHASHSEED": "1" if odd else "0",
            "CUDA_VISIBLE_DEVICES": "", **dict(more),
        },
        stdin=subprocess.DEVNULL, pass_fds=[number], start_new_session=True,
    )  # fmt: skip


def cpu_time() -> float:
    """CPU seconds of ended programs; half of them for several ranks, because two run at once."""
    return sum(_spent)


def forked(
    words: list[str],
    env: dict[str, str],
    modules: tuple[str, ...],
    ranks: int,
    timeout: float,
    more: dict[str, str],
    cwd: Path = HERE.parent,
) -> subprocess.CompletedProcess[str]:
    """Run a program on one process or several ranks, and wait for its end.

    If one rank fails, end all ranks and return 1, as torchrun does. more: environment variables,
    also for the template.
    """
    with Program(words, env, modules, ranks, more, cwd) as program:
        return program.finish(timeout)


class Program:
    """A program that runs in forks, one for each rank; as a context manager it kills running ranks
    at exit.

    pids: process ids of the ranks. For the arguments see `forked`.
    """

    def __init__(
        self,
        words: list[str],
        env: dict[str, str],
        modules: tuple[str, ...] = OURS,
        ranks: int = 1,
        more: dict[str, str] | None = None,
        cwd: Path = HERE.parent,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._out, self._err = (Path(self._folder.name) / name for name in ("out", "err"))
        for file in (self._out, self._err):
            file.touch()
        more = more or {}
        env, key = env | TUNABLES | more, tuple(sorted(more.items()))
        self.words, self.pids = words, list[int]()
        self._running: dict[int, tuple[Template, int]] = {}  # by file descriptor of a process
        for rank, place in enumerate(_environments(ranks)):
            environment = env | place
            odd = int(environment.get("RANK", rank)) % 2 == 1
            source = template(modules, odd, key)
            self.pids.append(source.start(words, environment, cwd, self._out, self._err))
            self._running[os.pidfd_open(self.pids[-1])] = source, self.pids[-1]
        self._seconds = 0.0

    def is_running(self) -> bool:
        """Whether no rank has ended."""
        poll = select.poll()
        for descriptor in self._running:
            poll.register(descriptor, select.POLLIN)
        return len(self._running) == len(self.pids) and not poll.poll(0)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all running ranks."""
        for descriptor in self._running:
            signal.pidfd_send_signal(descriptor, number)

    def finish(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """Wait for the end; after the timeout, kill all ranks and raise TimeoutExpired."""
        codes = self._wait(timeout)
        _spent.append(self._seconds / min(len(self.pids), 2))
        printed = self.printed()
        if codes is None:
            raise subprocess.TimeoutExpired(self.words, timeout, *printed)
        code = codes[0] if len(self.pids) == 1 else int(any(codes))
        return subprocess.CompletedProcess(self.words, code, *printed)

    def printed(self) -> tuple[str, str]:
        """Standard output and error so far."""
        return self._out.read_text(errors="replace"), self._err.read_text(errors="replace")

    def _wait(self, timeout: float) -> list[int] | None:
        """Exit codes in the order in which the processes ended; None after a timeout."""
        end, limit, codes = time.monotonic() + timeout, float("inf"), list[int]()
        poll = select.poll()
        for descriptor in self._running:
            poll.register(descriptor, select.POLLIN)
        late = False
        while self._running:
            left = min(end, limit) - time.monotonic()
            ended = poll.poll(1000 * left) if left > 0 else []
            for descriptor, _ in ended:
                source, pid = self._running.pop(descriptor)
                poll.unregister(descriptor)
                os.close(descriptor)
                code, seconds = source.reap(pid)
                codes.append(code)
                self._seconds += seconds
            if not ended:
                late = late or time.monotonic() >= end
                self.signal(signal.SIGKILL)
                end = limit = time.monotonic() + 60
            elif any(codes) and limit == float("inf"):
                limit = time.monotonic() + GRACE_S
                self.signal(signal.SIGTERM)
        return None if late else codes

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *error: object) -> None:
        self.signal(signal.SIGKILL)
        self._wait(60)
        self._folder.cleanup()


def _environments(ranks: int) -> list[dict[str, str]]:
    """The environment variables that torchrun would set, for every rank."""
    if ranks == 1:
        return [{}]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_store().port)}
    # one store for all runs, as torchrun has one for all restarts
    attempt = {"TORCHELASTIC_USE_AGENT_STORE": "True",
               "TORCHELASTIC_RESTART_COUNT": str(next(_attempts))}  # fmt: skip
    world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [
        address | attempt | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        for rank in range(ranks)
    ]


@cache
def _store() -> Any:
    from torch.distributed import TCPStore  # some tests do not need torch

    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

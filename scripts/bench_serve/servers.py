"""Starts the servers that are compared: ours, and others that are installed on this machine."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError

_MODEL = "bench"
"""What every server calls the model."""
_PATIENCE_S = 300.0
"""vLLM compiles when it starts."""


@dataclass(frozen=True)
class Load:
    """What the servers must be prepared for."""

    threads: int
    max_running: int
    max_length: int


@dataclass
class Server:
    """A server that runs; `process` is None if it was not started here."""

    url: str
    model: str = _MODEL
    process: subprocess.Popen[bytes] | None = None

    def stop(self) -> None:
        """End it, if it was started here."""
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def start(name: str, export: Path, load: Load, folder: Path, *options: str) -> Server:
    """Start a server by its name, wait until it answers, and write its output to a file in
    `folder`. options: appended to its command. Raises UserError, one line, if it is not installed
    or does not start."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [*_COMMANDS[name](export, load, port, folder), *options]
    env = {"OMP_NUM_THREADS": str(load.threads), "HF_HUB_OFFLINE": "1"}
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1"} if name == "vllm" else {}
    log = folder / f"{name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out, env=os.environ | env)
    server = Server(f"http://127.0.0.1:{port}/v1", process=process)
    deadline = time.monotonic() + _PATIENCE_S
    while not _answers(f"http://127.0.0.1:{port}/health"):
        if process.poll() is not None or time.monotonic() > deadline:
            server.stop()
            last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
            raise UserError(f"{name} did not start: {last[:300]}")
        time.sleep(0.2)
    return server


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def _ours(export: Path, load: Load, port: int, folder: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "serve", str(export), "--port", str(port), "--model-name", _MODEL,
        "--max-running", str(load.max_running), *more,
    ]  # fmt: skip


def _naive(export: Path, load: Load, port: int, folder: Path) -> list[str]:
    return _ours(export, load, port, folder, "--cache", "naive")


def _one_process(export: Path, load: Load, port: int, folder: Path) -> list[str]:
    return _ours(export, load, port, folder, "--engine-process", "off")


def _engine_process(export: Path, load: Load, port: int, folder: Path) -> list[str]:
    return _ours(export, load, port, folder, "--engine-process", "on")


def _vllm(export: Path, load: Load, port: int, folder: Path) -> list[str]:
    return [
        _installed("vllm"), "serve", str(export), "--served-model-name", _MODEL,
        "--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(load.max_length),
        "--max-num-seqs", str(load.max_running), "--enable-prompt-tokens-details",
    ]  # fmt: skip


def _vllm_eager(export: Path, load: Load, port: int, folder: Path) -> list[str]:
    return [*_vllm(export, load, port, folder), "--enforce-eager"]


def _llama(export: Path, load: Load, port: int, folder: Path) -> list[str]:
    model = export / "model-bf16.gguf"
    if not model.exists():
        raise UserError(
            f"{model}: missing, and llama-server reads nothing else; make it with python -m "
            f"scripts.to_gguf {export} --llama-cpp FOLDER"
        )
    threads, n = str(load.threads), load.max_running
    return [
        _installed("llama-server"), "-m", str(model), "-c", str(n * load.max_length),
        "-np", str(n), "-t", threads, "-tb", threads, "-b", "2048", "--port", str(port),
        "--alias", _MODEL, "--no-webui",
    ]  # fmt: skip


def _installed(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        raise UserError(f"{program}: not found in PATH; install it, or leave it out of --peers")
    return path


_COMMANDS: dict[str, Callable[[Path, Load, int, Path], list[str]]] = {
    "ours": _ours,
    "naive": _naive,
    "one-process": _one_process,
    "engine-process": _engine_process,
    "vllm": _vllm,
    "vllm-eager": _vllm_eager,
    "llama-server": _llama,
}
PEERS = tuple(name for name in _COMMANDS if name != "ours")

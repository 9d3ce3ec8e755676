"""`python -m serve`: starts, prints its URL, stops cleanly; a user error gives a one-line
message."""

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from serve.__main__ import main
from serve.engine.loading import open_export
from serve.server import listen
from tests.forks import Program
from tests.runs import started

ROOT = Path(__file__).resolve().parents[2]
LIVENESS_S = 30.0
GRACE = "120"
"""Seconds, more than the limit for hanging: a stop that needs them is found."""
ENDLESS = {"prompt": "a", "max_tokens": 99_000, "ignore_eos": True, "stream": True}
HALF = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
    b"Content-Length: 50\r\n\r\n{"
)


class Served:
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen[str] | Program, url: str) -> None:
        self.process = process
        self.url = url
        self.pid = process.pids[0] if isinstance(process, Program) else process.pid
        self.port = int(url.removesuffix("/v1").rsplit(":", 1)[1])

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def finish(self) -> None:
        """Wait for its end, which is clean. The limit is for hanging, and less than any grace."""
        if isinstance(self.process, Program):
            done = self.process.finish(LIVENESS_S)
            code, out, errors = done.returncode, done.stdout.split("\n", 1)[1], done.stderr
        else:
            out, errors = self.process.communicate(timeout=LIVENESS_S)
            code = self.process.returncode
        assert (code, out, errors) == (0, "", "")

    def wait_until_draining(self) -> None:
        """Until it has acted on the first signal: it accepts no connections any more."""
        deadline = time.monotonic() + LIVENESS_S
        with contextlib.suppress(ConnectionRefusedError):
            while True:
                assert time.monotonic() < deadline
                socket.create_connection(("127.0.0.1", self.port)).close()
                time.sleep(0.01)


def words(folder: Path, *options: str) -> list[str]:
    return ["-m", "serve", str(folder), "--port", "0", "--device", "cpu", *options]


@contextlib.contextmanager
def serving(folder: Path, *options: str) -> Iterator[Served]:
    """A new Python process, which is killed at the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, *words(folder, *options)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving "), line + process.communicate()[1]
        yield Served(process, line.split()[3])
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def forked(*arguments: str) -> Iterator[Served]:
    """The same in a fork, which has the modules loaded."""
    with started(*arguments) as program:
        deadline = time.monotonic() + LIVENESS_S
        while not (line := program.printed()[0]).endswith("\n"):
            assert program.is_running() and time.monotonic() < deadline, program.printed()
            time.sleep(0.01)
        assert line.startswith("serving "), program.printed()
        yield Served(program, line.split()[3])


@pytest.fixture(scope="module")
def long_folder(export_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export with a context that no test reaches the end of."""
    folder = tmp_path_factory.mktemp("long") / "long"
    shutil.copytree(export_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100_000}))
    return folder


def test_serves_on_one_local_address_only_and_stops(export_folder: Path) -> None:
    """CVE-2025-30202: no internal socket is open to the network."""
    more = ("--model-name=mine", "--dtype=bf16", f"--grace={GRACE}")
    with forked(*words(export_folder, *more)) as served:
        assert served.url.startswith("http://127.0.0.1:")
        body = {"model": "mine", "prompt": "a", "seed": 1}
        assert httpx.post(f"{served.url}/completions", json=body).status_code == 200
        assert listening(served.pid) == [("tcp", f"0100007F:{served.port:04X}")]
        served.signal(signal.SIGINT)
        served.finish()  # an idle server needs no grace


def listening(pid: int) -> list[tuple[str, str]]:
    """The sockets with which a process listens or receives datagrams: protocol and address."""
    own, found = set(), []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            own.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[9] in own and words[3] in ("0A", "07"):  # listens; receives datagrams
                found.append((table, words[1]))
    return found


@pytest.mark.parametrize("engine_process", ["off", pytest.param("on", marks=pytest.mark.slow)])
def test_stop_under_load_ends_streams_with_an_error(engine_process: str, long_folder: Path) -> None:
    more = ("--max-running", "1", "--grace", "0.2", "--engine-process", engine_process)
    with forked(*words(long_folder, *more)) as served:
        with httpx.stream("POST", f"{served.url}/completions", json=ENDLESS) as answer:
            lines = answer.iter_lines()
            assert "choices" in next(lines)
            served.signal(signal.SIGTERM)
            *_, error, done = [line for line in lines if line]
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "unavailable"
        assert done == "data: [DONE]"
        served.finish()


def engine_of(server: int) -> int:
    """The process id of the engine that a server has started."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == server and b"process_child" in (place / "cmdline").read_bytes():
                found.append(int(place.name))
    (pid,) = found
    return pid


@pytest.mark.slow  # three starts; the same with forks: tests/serve/frontend/test_engine_process.py
def test_an_engine_process_is_replaced_and_never_left_over(long_folder: Path) -> None:
    with serving(long_folder, "--engine-process", "on", "--grace", GRACE) as served:
        health = served.url.replace("/v1", "/health")
        first = engine_of(served.pid)
        with httpx.stream("POST", f"{served.url}/completions", json=ENDLESS) as answer:
            lines = answer.iter_lines()
            assert "choices" in next(lines)
            os.kill(first, signal.SIGKILL)
            error = [line for line in lines if line][-2]
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_lost"
        deadline = time.monotonic() + LIVENESS_S
        while httpx.get(health).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        second = engine_of(served.pid)
        assert second != first
        with httpx.stream("POST", f"{served.url}/completions", json=ENDLESS) as answer:
            assert "choices" in next(answer.iter_lines())
            served.signal(signal.SIGKILL)
            while Path(f"/proc/{second}").exists():
                assert time.monotonic() < deadline, "the engine continues without a server"
                time.sleep(0.05)
        assert isinstance(served.process, subprocess.Popen)
        assert "it is started again" in served.process.communicate()[1]


@pytest.mark.slow
def test_a_second_signal_stops_an_engine_process(long_folder: Path) -> None:
    with serving(long_folder, "--grace", GRACE, "--engine-process", "on") as served:
        engine = engine_of(served.pid)
        with httpx.stream("POST", f"{served.url}/completions", json=ENDLESS) as answer:
            assert "choices" in next(answer.iter_lines())
            served.signal(signal.SIGTERM)
            served.wait_until_draining()
            served.signal(signal.SIGTERM)
            served.finish()
        assert not Path(f"/proc/{engine}").exists()


def test_ctrl_c_while_modules_are_loaded(export_folder: Path) -> None:
    """No traceback. Python ends by the signal itself if it came while a text was executed."""
    process = subprocess.Popen(
        [sys.executable, *words(export_folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        while b"libtorch" not in Path(f"/proc/{process.pid}/maps").read_bytes():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=LIVENESS_S) == (b"", b"")
        assert process.returncode in (0, -signal.SIGINT)
    finally:
        process.kill()


def test_half_sent_bodies_do_not_delay_a_stop(export_folder: Path) -> None:
    with forked(*words(export_folder, "--grace", GRACE)) as served:
        with socket.create_connection(("127.0.0.1", served.port), timeout=LIVENESS_S) as half:
            half.sendall(HALF)
            assert half.recv(4096).startswith(b"HTTP/1.1 100"), "it reads the body"
            served.signal(signal.SIGTERM)
            assert half.recv(4096).startswith(b"HTTP/1.1 503")
        served.finish()


def test_a_second_signal_stops_at_once(long_folder: Path) -> None:
    with forked(*words(long_folder, "--grace", GRACE)) as served:
        with httpx.stream("POST", f"{served.url}/completions", json=ENDLESS) as answer:
            lines = answer.iter_lines()
            assert "choices" in next(lines)
            served.signal(signal.SIGTERM)
            served.wait_until_draining()
            assert "choices" in "".join(next(lines) for _ in range(4)), "the stream goes on"
            served.signal(signal.SIGTERM)
            served.finish()


FEW = """
import resource, runpy, sys
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (200, most))
runpy.run_module("serve", run_name="__main__", alter_sys=True)
"""


def test_few_open_files_are_enough_for_many_connections(export_folder: Path) -> None:
    """The usual soft limit is 1,024; the server raises it."""
    command = ["-c", FEW, *words(export_folder)[2:]]
    with forked(*command) as served, contextlib.ExitStack() as stack:
        assert resource.prlimit(served.pid, resource.RLIMIT_NOFILE)[0] > 400
        for _ in range(400):
            client = socket.create_connection(("127.0.0.1", served.port), LIVENESS_S)
            stack.enter_context(client)
        assert httpx.get(f"http://127.0.0.1:{served.port}/health").status_code == 200
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/folder"], "/no/such/folder: no such folder"),
        ([], "arguments are required: folder"),
        (["x", "--port", "70000"], "--port 70000: must lie between 0 and 65535"),
        (["x", "--port", "many"], "--port: invalid int value: 'many'"),
        (["x", "--max-running", "0"], "--max-running 0: must lie between"),
        (["x", "--grace", "-1"], "--grace -1.0: must lie between 0 and 3600"),
        (["x", "--colour", "red"], "unrecognized arguments: --colour red"),
        (["EXPORT", "--device", "abacus"], "--device abacus: must be auto, cpu, or"),
        (["EXPORT", "--device", "meta"], "--device meta: must be auto, cpu, or"),
        (["EXPORT", "--kv-tokens", "9999999999"], "--kv-tokens 9999999999: needs"),
        (["EXPORT", "--host", "256.1.1.1"], "cannot listen on 256.1.1.1"),
    ],
)
def test_faults_take_one_line(
    arguments: list[str], message: str, export_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [str(export_folder) if a == "EXPORT" else a for a in arguments]
    if "--port" not in filled:
        filled += ["--port", "0"]
    try:
        code = main(filled)
    except SystemExit as ended:  # of the parser
        code = int(ended.code or 0)
    out, errors = capsys.readouterr()
    assert (code, out) == (2, "")
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("\n") == 1


def test_taken_port(export_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main([str(export_folder), "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err


NO_TOKENS = '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}'
FAR_TOKEN = NO_TOKENS.replace("{}", '{"a": 5000000}')


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "no such file"),
        ("config.json", "{", "not valid JSON"),
        (
            "config.json",
            {"max_position_embeddings": "many"},
            "max_position_embeddings = 'many': wrong",
        ),
        ("config.json", {"dtype": "int3"}, "dtype = 'int3': must be one of"),
        ("config.json", {"eos_token_id": "end"}, "eos_token_id = 'end'"),
        ("config.json", {"vocab_size": 100}, "has token 299, the model only 100"),
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("tokenizer.json", NO_TOKENS, "has no tokens"),
        ("tokenizer.json", FAR_TOKEN, "has token 5000000, the model only 320 tokens"),
        ("generation_config.json", "{", "not valid JSON"),
        ("model.safetensors.index.json", None, ""),
    ],
)
def test_damaged_exports(
    export_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    content: str | dict[str, object] | None,
    message: str,
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(export_folder, folder)
    path = folder / file
    if content is None:
        path.unlink()
    elif isinstance(content, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | content))
    else:
        path.write_text(content)
    if not message:  # the index is for other readers: names are read from the files themselves
        open_export(folder)
        return
    assert main([str(folder), "--port", "0"]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


def test_end_tokens_and_missing_tokenizer(export_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(export_folder, folder)
    (folder / "tokenizer.json").unlink()
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    found = open_export(folder)
    assert found.end_tokens == {3, 4}
    assert found.tokenizer is None


def test_no_delay_between_headers_and_first_token() -> None:
    with listen("127.0.0.1", 0) as listener:
        with socket.create_connection(listener.getsockname()):
            accepted, _ = listener.accept()
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            accepted.close()

"""`python -m serve`: starts, prints its URL, stops cleanly; a user error gives a one-line
message."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from serve.__main__ import listen, main
from serve.engine.loading import open_export

ROOT = Path(__file__).resolve().parents[2]


def start(folder: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    """The process and the URL in its only line of output."""
    process = subprocess.Popen(
        [sys.executable, "-m", "serve", str(folder), "--port", "0", "--device", "cpu", *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("serving "), line + process.communicate()[1]
    return process, line.split()[3]


def test_serves_and_stops(export_folder: Path) -> None:
    process, url = start(export_folder, "--model-name", "mine", "--dtype", "bf16")
    try:
        assert url.startswith("http://127.0.0.1:")
        answer = httpx.post(f"{url}/completions", json={"model": "mine", "prompt": "a", "seed": 1})
        assert answer.status_code == 200
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        out, errors = process.communicate(timeout=20)
        assert (process.returncode, out, errors) == (0, "", "")
        assert time.monotonic() - begin < 4, "an idle server needs no grace"
    finally:
        process.kill()


def test_stop_under_load_ends_streams_with_an_error(export_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "long"
    shutil.copytree(export_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100_000}))
    process, url = start(folder, "--max-running", "1", "--grace", "0.2")
    body = {"prompt": "a", "max_tokens": 99_000, "ignore_eos": True, "stream": True}
    try:
        with httpx.stream("POST", f"{url}/completions", json=body) as answer:
            lines = answer.iter_lines()
            assert "choices" in next(lines)
            process.send_signal(signal.SIGTERM)
            *_, error, done = [line for line in lines if line]
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "unavailable"
        assert done == "data: [DONE]"
        out, errors = process.communicate(timeout=20)
        assert (process.returncode, out, errors) == (0, "", "")
    finally:
        process.kill()


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
        ("config.json", {"vocab_size": 100}, "has 300 tokens, the model 100"),
        ("tokenizer.json", "{}", "not a tokenizer"),
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


def test_half_sent_bodies_do_not_delay_a_stop(export_folder: Path) -> None:
    process, url = start(export_folder, "--grace", "5")
    try:
        port = int(url.removesuffix("/v1").rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as half:
            half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            begin = time.monotonic()
            assert half.recv(4096).startswith(b"HTTP/1.1 503")
        out, errors = process.communicate(timeout=20)
        assert (process.returncode, out, errors) == (0, "", "")
        assert time.monotonic() - begin < 3
    finally:
        process.kill()


def test_a_second_signal_stops_at_once(export_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "long"
    shutil.copytree(export_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100_000}))
    process, url = start(folder, "--grace", "60")
    body = {"prompt": "a", "max_tokens": 99_000, "ignore_eos": True, "stream": True}
    try:
        with httpx.stream("POST", f"{url}/completions", json=body) as answer:
            lines = answer.iter_lines()
            assert "choices" in next(lines)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            assert process.poll() is None
            begin = time.monotonic()
            process.send_signal(signal.SIGTERM)
            errors = process.communicate(timeout=20)[1]
            assert (process.returncode, errors) == (0, "")
            assert time.monotonic() - begin < 3
    finally:
        process.kill()

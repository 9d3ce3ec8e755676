"""`python -m serve bench`: measures what the server did."""

import re
import socket
import threading

import httpx
import pytest

from serve.__main__ import main
from serve.bench import workloads
from serve.bench.client import Answer
from serve.bench.report import measured
from serve.bench.workloads import NAMES, build, longest
from serve.engine.core import EngineCore, EngineOptions
from serve.engine.loading import Export
from tests.serve.conftest import run_server


def test_it_reports_the_load_that_the_server_had(
    export: Export, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With shorter answers than those of the workload."""
    monkeypatch.setitem(
        workloads._BUILDERS, "random", lambda draw, n: [[(draw(20), 9)] for _ in range(n)]
    )
    core = EngineCore(export, EngineOptions(kv_tokens=4096))
    with run_server(core, api_key="secret") as server:
        for url, clients in ((server.url, "4"), (server.url + "/v1/", "2")):
            assert main(["bench", url, "--clients", clients, "--api-key", "secret"]) == 0
        out, errors = capsys.readouterr()
        headers = {"Authorization": "Bearer secret"}
        metrics = httpx.get(f"{server.url}/metrics", headers=headers).text
        assert main(["bench", server.url]) == 2
        assert "401" in capsys.readouterr().err
    head, _, first, *_, second = out.splitlines()
    assert errors == "" and head.count("|") == first.count("|")
    assert first.startswith("| random | 4 |") and second.startswith("| random | 2 |")
    generated = re.search(r"^sglang:generation_tokens_total\S* (\S+)", metrics, re.MULTILINE)
    assert generated is not None and float(generated[1]) == 2 * 8 * 9


def test_measures_of_known_answers() -> None:
    answers = [
        Answer(0.0, [1.0, 1.5, 2.0], prompt_tokens=10, cached_tokens=5, output_tokens=3),
        Answer(0.0, [3.0], prompt_tokens=30, output_tokens=1),
    ]
    assert measured(4.0, answers) == {
        "out tok/s": 1.0,
        "in tok/s": 10.0,
        "TTFT ms p50/p90/p99": "3000.0 / 3000.0 / 3000.0",
        "TPOT ms p50/p90/p99": "500.0 / 500.0 / 500.0",
        "ITL ms p50/p90/p99": "500.0 / 500.0 / 500.0",
        "hit rate": 0.125,
    }


@pytest.mark.parametrize("name", NAMES)
def test_workloads_are_seeded_and_as_long_as_stated(name: str) -> None:
    made = build(name, 4, 100, 1)
    assert made == build(name, 4, 100, 1) != build(name, 4, 100, 2)
    assert longest(made) == {
        "random": 192, "shared-prefix": 560, "multi-turn": 352, "long-among-short": 1040,
    }[name]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "arguments are required: url"),
        (["file:///etc/passwd"], "must be a URL such as"),
        (["http://"], "must be a URL such as"),
        (["http://[::1"], "must be a URL such as"),
        (["URL", "--clients", "0"], "--clients: must lie between"),
        (["URL", "--vocab", "3"], "--vocab 3: must lie between"),
        (["URL", "--api-key", "é"], "--api-key: must be of ASCII"),
        (["CLOSED"], ": Connection refused\n"),
        (["URL", "--model", "other"], "--model other: "),
        (["URL", "--workload", "multi-turn"], "has 352 tokens, the model at most 192"),
    ],
)
def test_errors_take_one_line(
    words: list[str], message: str, server: object, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    filled = {"URL": getattr(server, "url", ""), "CLOSED": closed}
    try:
        code = main(["bench", *(filled.get(word, word) for word in words)])
    except SystemExit as ended:  # of the parser
        code = int(ended.code or 0)
    out, errors = capsys.readouterr()
    assert (code, out) == (2, "")
    assert errors.startswith("error: ") and message in errors and errors.count("\n") == 1


def test_a_server_that_is_none_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    """It closes the connection, or lists no model."""
    for reply in (b"", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", b"garbage\r\n\r\n"):
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def work(reply: bytes = reply, listener: socket.socket = listener) -> None:
                client, _ = listener.accept()
                client.recv(4096)
                client.sendall(reply)
                client.close()

            thread = threading.Thread(target=work)
            thread.start()
            assert main(["bench", f"http://127.0.0.1:{listener.getsockname()[1]}"]) == 2
            thread.join()
        errors = capsys.readouterr().err
        assert errors.startswith("error: ") and errors.count("\n") == 1

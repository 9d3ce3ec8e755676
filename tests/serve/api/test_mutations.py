"""Malformed requests of every kind: each gets an answer that names the client's error, and nothing
of the server or of another client is affected."""

import gc
import json
import logging
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from serve.engine.core import EngineCore, EngineOptions
from serve.engine.loading import Export
from tests.serve.api.mutations import mutation
from tests.serve.conftest import RunningServer, run_server

MAX_GROWTH = 50 * 2**20
"""Bytes that the process may grow, after the first requests of every kind: a share of all."""
WARM = 0.2
N_CLIENTS = 8
PATIENCE_S = 0.5
"""After this time without an answer the client ends its side: the request was incomplete."""
LEAKS = re.compile(r"Traceback|0x[0-9a-f]{6}|\.py\b|site-packages|object at")
GOOD = {"prompt": "The quick", "max_tokens": 6, "temperature": 0, "ignore_eos": True}


def resident() -> int:
    """Bytes of memory of this process."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def exchange(port: int, data: bytes) -> bytes:
    """The answer to raw bytes, until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
        found, patient = b"", True
        try:
            client.sendall(data)
            while True:
                try:
                    part = client.recv(1 << 16)
                except TimeoutError:
                    assert patient, f"no end of the answer to {data[:300]!r}"
                    client.shutdown(socket.SHUT_WR)
                    client.settimeout(20)
                    patient = False
                    continue
                if not part:
                    return found
                found += part
        except (BrokenPipeError, ConnectionResetError):  # refused before everything was sent
            return found


@contextmanager
def good_client(server: RunningServer) -> Iterator[Counter[str]]:
    """A client that sends valid requests all the time; the texts that it gets."""
    texts: Counter[str] = Counter()
    done = threading.Event()

    def work() -> None:
        with httpx.Client(base_url=server.url, timeout=20) as http:
            while not done.is_set():
                try:
                    answer = http.post("/v1/completions", json=GOOD)
                    texts[answer.json()["choices"][0]["text"]] += 1
                    assert http.get("/health").status_code == 200
                except Exception as error:
                    texts[f"failed: {error!r}"] += 1
                done.wait(0.1)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield texts
    finally:
        done.set()
        thread.join()


def check(data: bytes, found: bytes) -> int | None:
    """The status of an answer, which is no server error and reveals nothing."""
    if not found:
        return None
    head, _, body = found.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    shown = (data[:2000], found[:2000])
    assert status < 500 or status == 503, shown
    assert b"internal_error" not in found, shown
    if status >= 400 and body:
        content = json.loads(body) if b"json" in head else {}
        message = content["error"]["message"] if "error" in content else content.get("message", "")
        assert message and message.isprintable(), shown
        assert not LEAKS.search(message), shown
    return status


def attack(server: RunningServer, seeds: range, folder: Path) -> tuple[Counter[int | None], int]:
    """The number of answers of each status, and the growth of this process in bytes."""

    def send(seed: int) -> int | None:
        data = mutation(seed, str(folder))
        return check(data, exchange(server.port, data))

    gc.freeze()  # collecting then visits only what is created from here on
    n_warm = int(WARM * len(seeds))
    with ThreadPoolExecutor(N_CLIENTS) as pool:
        statuses = Counter(pool.map(send, seeds[:n_warm]))
        before = resident()
        statuses.update(pool.map(send, seeds[n_warm:]))
    return statuses, resident() - before


def run_attack(
    export: Export, folder: Path, seeds: range, caplog: pytest.LogCaptureFixture
) -> Counter[int | None]:
    caplog.set_level(logging.ERROR)
    options = EngineOptions(kv_tokens=4096)
    with run_server(EngineCore(export, options), model_path=str(folder)) as server:
        logging.getLogger("uvicorn").addHandler(caplog.handler)  # it does not propagate
        alone = httpx.post(f"{server.url}/v1/completions", json=GOOD).json()["choices"][0]["text"]
        with good_client(server) as texts:
            statuses, growth = attack(server, seeds, folder)
        print(f"\nstatuses {dict(statuses)}, growth {growth / 2**20:.1f} MiB, {texts.total()} good")
        assert set(texts) == {alone}
        assert texts.total() > len(seeds) // 100
        server.wait_until_idle()
        assert httpx.get(f"{server.url}/health").status_code == 200
    logging.getLogger("uvicorn").removeHandler(caplog.handler)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert growth < MAX_GROWTH
    return statuses


def test_malformed_requests(
    export: Export, export_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    statuses = run_attack(export, export_folder, range(300), caplog)
    assert {200, 400, 404, 405, 413, 431} <= statuses.keys()
    assert statuses[None] < 50, "almost all are answered"


@pytest.mark.slow
def test_ten_thousand_malformed_requests(
    export: Export, export_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    statuses = run_attack(export, export_folder, range(500, 10_500), caplog)
    assert statuses[None] < 1000

"""Two ranks in two network namespaces, as on two hosts with a link of 1 ms between them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench_dispatch.slow_link import ADDRESSES, INTERFACE, two_hosts
from tests.runs import ROOT, environment

COMMAND = ["-m", "serve", "generate"]
QUESTION = ["--prompt", "def add(a, b):", "--max-tokens", "4", "--temperature", "0", "--json"]


def namespaces_work() -> bool:
    """Whether this process may create network namespaces and TUN devices."""
    if not (shutil.which("ip") and os.geteuid() == 0 and os.path.exists("/dev/net/tun")):
        return False
    name = f"probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    return made and not subprocess.run(["ip", "netns", "del", name]).returncode


def start(words: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words, env=environment() | env, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.slow  # tests/serve/ranks/test_meshes.py does the same on one host
@pytest.mark.skipif(not namespaces_work(), reason="needs root, ip and /dev/net/tun")
@pytest.mark.parametrize("degrees", [["--tp", "2", "--ep", "2"]], ids=" ".join)
def test_two_hosts_give_the_text_of_one_process(degrees: list[str], export_folder: Path) -> None:
    command = [sys.executable, *COMMAND, str(export_folder), *QUESTION, "--device", "cpu"]
    shared = {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "29611",
        "MASTER_ADDR": ADDRESSES[0], "GLOO_SOCKET_IFNAME": INTERFACE,
    }  # fmt: skip
    alone = start(command, {})
    with two_hosts(delay_ms=1, mbit=1000) as hosts:
        ranks = [
            start(["ip", "netns", "exec", host, *command, *degrees], shared | {"RANK": str(rank)})
            for rank, host in enumerate(hosts)
        ]
        try:
            ends = [rank.communicate(timeout=120) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    expected, _ = alone.communicate(timeout=60)
    assert [rank.returncode for rank in ranks] == [0, 0], ends
    assert [errors for _, errors in ends] == ["", ""]
    assert ends[1][0] == "", "only rank 0 prints"
    assert json.loads(ends[0][0]) == json.loads(expected)
    assert len(json.loads(expected)["token_ids"]) == 4

"""Ranks that do not meet: each gives a one-line error, and none waits forever."""

import socket
import threading
from collections.abc import Callable

import pytest

from configs.errors import UserError
from parallel import rendezvous
from parallel.launch_environment import LaunchEnvironment
from tests.runs import free_port


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(rendezvous, "_BRIEF_S", 0.2)
    monkeypatch.setattr(rendezvous, "_PATIENCE_S", 2.0)


@pytest.fixture
def brief(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests in which nobody comes."""
    monkeypatch.setattr(rendezvous, "_PATIENCE_S", 0.3)


def placement(rank: int, world: int, port: int, address: str = "127.0.0.1") -> LaunchEnvironment:
    return LaunchEnvironment(rank, world, rank, world, address, port)


def fault(function: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        function()
    line = str(caught.value)
    assert "\n" not in line and len(line) < 400
    return line


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        line = fault(lambda: rendezvous.meet(placement(0, 2, port)))
    assert f"MASTER_PORT = {port}: cannot be opened on this host: Address already in use" in line


def test_who_answers_is_another_program(brief: None) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=8) as other:
        line = fault(lambda: rendezvous.meet(placement(1, 2, other.getsockname()[1])))
    assert "who answers there is not rank 0" in line


@pytest.mark.parametrize("rank", [0, 1])
def test_a_name_that_nobody_knows(rank: int) -> None:
    port = free_port()
    line = fault(lambda: rendezvous.meet(placement(rank, 2, port, "no-such-host.invalid")))
    assert "MASTER_ADDR = no-such-host.invalid: " in line


def test_no_rank_0(brief: None) -> None:
    line = fault(lambda: rendezvous.meet(placement(1, 2, free_port())))
    assert "rank 1 does not reach rank 0: Connection refused" in line


def test_a_rank_that_does_not_come(brief: None) -> None:
    line = fault(lambda: rendezvous.meet(placement(0, 3, free_port())))
    assert "WORLD_SIZE = 3: rank 1, 2 did not come" in line


def together(*placements: LaunchEnvironment) -> list[str]:
    """The error of each rank; empty for one that connected to the others."""
    told = [""] * len(placements)
    stores = []  # all ranks use that of rank 0

    def meet(i: int) -> None:
        try:
            stores.append(rendezvous.meet(placements[i]))
        except UserError as error:
            told[i] = str(error)

    threads = [threading.Thread(target=meet, args=(i,)) for i in range(len(placements))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return told


def test_ranks_that_disagree_hear_it_all() -> None:
    port = free_port()
    assert together(*[placement(rank, 3, port) for rank in range(3)]) == ["", "", ""]
    port = free_port()
    told = together(placement(0, 2, port), placement(1, 3, port))
    assert all("WORLD_SIZE" in line and "given another number" in line for line in told)
    port = free_port()
    told = together(*[placement(rank, 3, port) for rank in (0, 1, 1)])
    assert all("RANK = 1: two processes have this rank" in line for line in told)

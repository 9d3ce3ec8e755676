"""Exchanges through the store between threads that are ranks, in any order of arrival."""

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from configs.errors import UserError
from parallel.ranks import Ranks
from parallel.store_group import Abandoned, StoreGroup


def on_ranks(world: int, function: Callable[[StoreGroup], Any]) -> list[Any]:
    """Run a function on `world` ranks; their results, or errors."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found: list[Any] = [None] * world

    def work(rank: int) -> None:
        try:
            found[rank] = function(
                StoreGroup(Ranks(rank, world, torch.device("cpu"), store), "test")
            )
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


@pytest.mark.parametrize("world", [1, 2, 5])
def test_all_get_the_result_and_the_first_gets_all_values(world: int) -> None:
    def work(group: StoreGroup) -> list[Any]:
        rng, found = random.Random(group.rank), list[Any]()
        for i in range(6):
            time.sleep(rng.random() * 0.01)
            found.append(group.on_first(lambda: {"i": i}))  # noqa: B023
            found.append(group.collect(f"{group.rank}-{i}".encode() + b"\xff\0"))
        return found

    for rank, found in enumerate(on_ranks(world, work)):
        for i in range(6):
            assert found[2 * i] == {"i": i}
            values = [f"{r}-{i}".encode() + b"\xff\0" for r in range(world)]
            assert found[2 * i + 1] == (values if rank == 0 else [])


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (UserError("wrong"), "wrong"),
        (OSError(28, "No space left on device", "file"), "file: No space left on device"),
        (KeyError("unforeseen"), "KeyError: 'unforeseen'"),
    ],
)
def test_an_error_of_the_first_is_raised_on_all(error: Exception, text: str) -> None:
    def fail() -> None:
        raise error

    found = on_ranks(3, lambda group: group.on_first(fail))
    assert [(type(one), str(one)) for one in found] == [(UserError, text)] * 3


def test_a_wait_can_be_abandoned() -> None:
    def work(group: StoreGroup) -> None:
        if group.rank:
            threading.Timer(0.05, group.abandon).start()
            group.on_first(lambda: None)

    found = on_ranks(2, work)
    assert found[0] is None and isinstance(found[1], Abandoned)

"""Exchanges between ranks through the launcher's store, at the same time as a step's collectives.

A second thread must not use the process groups of a step: the operations of a group run in the
order in which they are started, which must be the same on all ranks. The store has no such order.
"""

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Any

import torch.distributed as dist

from configs.errors import UserError
from parallel.ranks import Ranks, outcome

_SHORTEST_S, _LONGEST_S = 0.002, 0.2
"""Pauses between two looks into the store; each is twice as long as the one before."""


class Abandoned(RuntimeError):
    """A wait was ended by `StoreGroup.abandon`."""


class StoreGroup:
    """Operations that all ranks call in the same order, each from one thread at a time."""

    def __init__(self, ranks: Ranks, name: str) -> None:
        """name: the same on all ranks, different for each group."""
        self.rank, self.world, self._name = ranks.rank, ranks.world, name
        # a separate connection: another thread may be waiting in the rank's own
        self._store: dist.Store | None = None
        if ranks.world > 1:
            self._store = ranks.store.clone()  # type: ignore[attr-defined]
        self._calls = count()
        self._over = threading.Event()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def on_first(self, function: Callable[[], Any]) -> Any:
        """Run `function` on rank 0; all ranks get its result (JSON), or its error as UserError."""
        answer: dict[str, Any] = {}
        if self.is_first:
            try:
                answer = outcome(function)
            except Exception as error:  # the others must not wait for ever
                answer = {"error": f"{type(error).__name__}: {error}"}
        key = f"{self._name}/{next(self._calls)}"
        if self._store is not None:
            if self.is_first:
                self._store.set(key, json.dumps(answer))
            else:
                answer = json.loads(self._wait(key))
        if "error" in answer:
            raise UserError(answer["error"])
        return answer["result"]

    def collect(self, value: bytes) -> list[bytes]:
        """Every rank's `value`, in rank order, on rank 0; an empty list on the others."""
        key = f"{self._name}/{next(self._calls)}"
        if self._store is None:
            return [value]
        if not self.is_first:
            self._store.set(f"{key}/{self.rank}", value)  # type: ignore[arg-type]
            return []
        found = [value]
        for rank in range(1, self.world):
            found.append(self._wait(f"{key}/{rank}"))
            with suppress(RuntimeError):
                self._store.delete_key(f"{key}/{rank}")  # they may be large
        return found

    def abandon(self) -> None:
        """End the waits of another thread: this process ends, or a rank is lost."""
        self._over.set()

    def _wait(self, key: str) -> bytes:
        assert self._store is not None
        pause = _SHORTEST_S
        while not self._store.check([key]):
            if self._over.wait(pause):
                raise Abandoned(key)
            pause = min(2 * pause, _LONGEST_S)
        return bytes(self._store.get(key))

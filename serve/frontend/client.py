"""What HTTP needs of an engine, in the same process or in another one.

`EngineThread` runs the engine in a thread of this process, `EngineProcess` in a process of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from serve.engine.core import EngineCore
from serve.engine.input_processor import InputProcessor
from serve.engine.request import Output, Request

Deliver = Callable[[Output], None]
"""Called with each output of a request, in a thread of the client; must return at once."""
Status = Literal["ok", "starting", "stopped"]


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Numbers of an engine at one moment, and totals since it started."""

    n_running: int = 0
    n_waiting: int = 0
    n_used_pages: int = 0
    """Pages of the KV cache that requests use; cached prefixes without a user are free."""
    n_pages: int = 1
    n_prompt_tokens: int = 0
    """Of admitted requests; `n_cached_tokens` of them were in the prefix cache."""
    n_cached_tokens: int = 0
    n_generated: int = 0
    n_retracted: int = 0
    n_jumped: int = 0

    @property
    def token_usage(self) -> float:
        return self.n_used_pages / self.n_pages

    @property
    def hit_rate(self) -> float:
        return self.n_cached_tokens / max(1, self.n_prompt_tokens)


def read_stats(core: EngineCore) -> EngineStats:
    """From any thread: numbers of a step that is running may be of different moments."""
    scheduler = core.scheduler
    n_pages = max(1, core.allocator.n_pages - 1)
    return EngineStats(
        n_running=len(scheduler.running),
        n_waiting=len(scheduler.waiting),
        n_used_pages=n_pages - core.allocator.n_free - core.pages.prefixes.n_evictable,
        n_pages=n_pages,
        n_prompt_tokens=scheduler.n_prompt_tokens,
        n_cached_tokens=scheduler.n_cached_tokens,
        n_generated=core.n_generated,
        n_retracted=scheduler.n_retracted,
        n_jumped=core.n_jumped,
    )


class EngineClient(Protocol):
    """An engine that answers requests. Any thread may call it."""

    inputs: InputProcessor
    """Makes the requests."""

    @property
    def status(self) -> Status:
        """`starting`: a lost process is being replaced, and requests are refused."""
        ...

    def start(self) -> None:
        """Begin to compute. A second call has no effect."""
        ...

    def stop(self, wait: bool = True) -> None:
        """End after the current step; running requests are delivered as cancelled."""
        ...

    def submit(self, requests: Sequence[Request], deliver: Deliver, limited: bool = True) -> None:
        """Queue all of `requests` or none of them, with RequestError: 429 if the queue is full, 503
        if the engine does not run.

        limited: reject requests that exceed the queue.
        """
        ...

    def refuse_if_full(self) -> None:
        """Raise RequestError (429) if not even one request would be queued; before any work on
        it."""
        ...

    def cancel(self, requests: Sequence[Request]) -> None:
        """Stop requests and deliver no more of their outputs. Finished ones are unchanged."""
        ...

    def flush_cache(self) -> None:
        """Remove all cached prefixes, between two steps."""
        ...

    def update_weights(self, folder: str) -> None:
        """Continue with the weights of another export. Raises UserError without any change."""
        ...

    def stats(self) -> EngineStats:
        """Numbers of now; it may wait for another process, but not for a step."""
        ...

    def expert_counts(self) -> NDArray[np.int64]:
        """`[MoE layers, experts]`, see `EngineCore.expert_counts`; with several ranks it waits for
        a step."""
        ...

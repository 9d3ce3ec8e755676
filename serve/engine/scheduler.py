"""Which tokens of which requests are computed in the next step.

Continuous batching (Orca, OSDI'22) with one token budget per step: every running request that
only lacks its newest token gets one (decode); what is left of the budget goes to prompts, oldest
first, cut into chunks where they are longer (Sarathi-Serve, arXiv:2403.02310). So a long prompt
never stops the others for more than one step of bounded size.

First come, first served: every running request is older than every waiting one. A request is
admitted when the cache has pages for all tokens it has, plus one spare page per running request.
When a decode finds no page, the youngest running request is preempted: it gives its pages back,
keeps its tokens, and is recomputed later. The oldest one therefore always moves on.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from serve.cache.kv_cache import KvCache
from serve.engine.request import FinishReason, Request, RequestError


@dataclass(frozen=True)
class Chunk:
    """`length` tokens of `request` from position `start` on."""

    request: Request
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def samples(self) -> bool:
        """The chunk reaches the newest token, so the next one can be sampled."""
        return self.end == len(self.request.tokens)


class Scheduler:
    """Queues, admission and preemption. Owns the pages of all requests."""

    def __init__(
        self, cache: KvCache, *, max_running: int, max_batch_tokens: int, max_waiting: int
    ) -> None:
        assert max_batch_tokens >= max_running, "every running request must get its token"
        self.cache = cache
        self.max_running = max_running
        self.max_batch_tokens = max_batch_tokens
        self.max_waiting = max_waiting
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.n_preempted = 0
        self._n_added = 0

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    def refuse_if_full(self, n_new: int) -> None:
        """RequestError (503) where the queue has no room for `n_new` more."""
        present = len(self.waiting) + len(self.running)
        if present + n_new > self.max_waiting + self.max_running:
            raise RequestError(
                "the server is at its limit; try again later", None, 503, "overloaded"
            )

    def add(self, requests: Sequence[Request]) -> None:
        """Queue new requests, in the order in which they are to be served."""
        for request in requests:
            assert request.number < 0, "a request is added once"
            request.number = self._n_added
            self._n_added += 1
            self.waiting.append(request)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Take a request out, wherever it is, and free its pages. Again has no effect."""
        if request.finish_reason is not None:
            return
        request.finish_reason = reason
        if request.pages:
            self.running.remove(request)
            self._free(request)
        else:
            self.waiting.remove(request)

    def next_batch(self) -> list[Chunk]:
        """The chunks of the next step, those of length 1 first; empty when there is no work."""
        batch = []
        for request in tuple(self.running):
            if request.pages and request.remaining == 1 and self._grow(request):
                batch.append(Chunk(request, request.computed, 1))
        budget = self.max_batch_tokens - len(batch)
        for request in self.running:
            if request.remaining > 1 and budget:
                batch.append(Chunk(request, request.computed, min(request.remaining, budget)))
                budget -= batch[-1].length
        while budget and self._admit():
            request = self.running[-1]
            batch.append(Chunk(request, 0, min(request.remaining, budget)))
            budget -= batch[-1].length
        assert batch or not self.busy, "there is work but nothing can run"
        return sorted(batch, key=lambda chunk: chunk.length > 1)

    def check(self) -> None:
        """Assert the invariants: order of arrival, limits, and no page lost or shared."""
        numbers = [request.number for request in (*self.running, *self.waiting)]
        assert numbers == sorted(numbers), "a younger request overtook an older one"
        assert len(self.running) <= self.max_running
        assert not any(request.pages or request.computed for request in self.waiting)
        for request in self.running:
            assert request.computed <= len(request.pages) * self.cache.page_size
        self.cache.allocator.check(request.pages for request in self.running)

    def _admit(self) -> bool:
        """Move the oldest waiting request to the running ones, if it fits."""
        if not self.waiting or len(self.running) >= self.max_running:
            return False
        request = self.waiting[0]
        needed = self.cache.pages_for(len(request.tokens))
        if self.cache.allocator.n_free < needed + len(self.running):
            return False
        pages = self.cache.allocator.allocate(needed)
        assert pages is not None
        request.pages = pages
        self.running.append(self.waiting.popleft())
        return True

    def _grow(self, request: Request) -> bool:
        """Give `request` room for its newest token. False if that cost it its own place."""
        while self.cache.pages_for(len(request.tokens)) > len(request.pages):
            page = self.cache.allocator.allocate(1)
            if page is not None:
                request.pages += page
                continue
            youngest = self.running.pop()
            self._free(youngest)
            self.waiting.appendleft(youngest)
            self.n_preempted += 1
            if youngest is request:
                return False
        return True

    def _free(self, request: Request) -> None:
        self.cache.allocator.release(request.pages)
        request.pages = []
        request.computed = 0

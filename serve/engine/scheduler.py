"""Chooses the tokens and requests of the next step.

Continuous batching (Orca, OSDI'22) with one token budget per step: every running request that
only lacks its newest token gets one (decode); the rest of the budget is for prompts, cut into
chunks if they are longer (Sarathi-Serve, arXiv:2403.02310). So a long prompt never delays the
others by more than one step of bounded size.

**Order of admission.** Higher priority first; within a priority the longest cached prefix first
(RadixAttention, arXiv:2312.07104), so that recently used prefixes are not evicted and recomputed;
then order of arrival. No request starves: one that later requests of any priority have overtaken
`max_overtaken` times is next, and none is admitted before it. A request whose prefix another one
is about to compute waits for it, if that is faster than computing it twice.

**Groups.** The choices and prompts of one call are a group. Within a priority the group with the
fewest running requests is next, whatever is cached, so a call with many choices does not keep
others waiting. If a group has waited `patience` steps with none of its requests running, a request
of the group with the most running ones, at least two, is retracted for it.

**Memory.** A request holds pages for its current tokens, not for those it may generate. It is
admitted if its pages are available and, in addition, each running request can grow by some tokens
(`headroom`). If a running request gets no page, the running request of lowest rank is retracted: it
frees its pages, keeps its tokens, and continues later. The first in rank therefore always
proceeds. Each retraction doubles the headroom, each step lowers it a little: a retracted request is
admitted again only when there is memory for some time.
"""

import bisect
import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from serve.cache.manager import PageManager
from serve.cache.prefix_cache import TOKEN_BYTES, common_pages
from serve.engine.request import FinishReason, Request, RequestError

_MOST_SORTED = 128
"""Number of waiting requests that are ordered by their cached prefix; the others wait."""
_MOST_SCANNED = 1024
"""Number of waiting requests among which those are chosen."""
_MOST_REFUSED = 8
"""Number of requests that do not fit after which admission ends for this step."""
_MOST_HEADROOM = 1 << 14
_DECAY = 0.995
"""Factor on the headroom per step."""


@dataclass(frozen=True)
class Chunk:
    """`length` tokens of `request` from position `start` on."""

    request: Request
    start: int
    length: int
    samples: bool
    """Whether it includes the newest token, so that the next one can be sampled."""
    index: int
    """Index of that token in the output, from 0."""

    @property
    def end(self) -> int:
        return self.start + self.length


def _rank(request: Request) -> tuple[bool, int, int]:
    return not request.aged, -request.priority, request.number


def n_excess(most: int, n_queued: int, n_new: int) -> int:
    """Number of requests that must end before a queue of `most`, which has `n_queued`, can hold
    `n_new` more. Raises RequestError if it never can."""
    if n_new > most:
        raise RequestError(f"at most {most} choices of all prompts fit into the queue", "n")
    return max(0, n_queued + n_new - most)


class Scheduler:
    """Queues, admission and retraction."""

    def __init__(
        self,
        pages: PageManager,
        *,
        max_running: int,
        max_batch_tokens: int,
        max_waiting: int,
        max_overtaken: int = 64,
        patience: int = 16,
    ) -> None:
        assert max_batch_tokens >= max_running, "every running request must get its token"
        self.pages = pages
        self.max_running = max_running
        self.max_batch_tokens = max_batch_tokens
        self.max_waiting = max_waiting
        self.max_overtaken = max_overtaken
        self.patience = patience
        self.waiting: list[Request] = []
        """In rank: those that were overtaken too often, then by priority and arrival."""
        self.running: list[Request] = []
        """In rank."""
        self.n_retracted = 0
        self.n_prompt_tokens = 0
        """Prompt tokens of requests admitted for the first time; `n_cached_tokens` of them were
        cached."""
        self.n_cached_tokens = 0
        self._n_added = 0
        self._n_steps = 0
        self._headroom = float(pages.page_size)

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    def n_excess(self, n_new: int, n_coming: int = 0) -> int:
        """See the function `n_excess`, after `n_coming` more."""
        n_queued = len(self.waiting) + len(self.running) + n_coming
        return n_excess(self.max_waiting + self.max_running, n_queued, n_new)

    def add(self, requests: Sequence[Request]) -> None:
        """Queue new requests, in order of arrival."""
        for request in requests:
            assert request.number < 0, "a request is added once"
            assert request.compiling is None or request.grammar is not None, "start_grammars"
            request.number = self._n_added
            self._n_added += 1
            self._enqueue(request)

    def finish(self, request: Request, reason: FinishReason, keep: bool = True) -> None:
        """Remove a request in any state, and free its pages. A second call has no effect.

        keep: its computed pages may be reused.
        """
        if request.finish_reason is not None:
            return
        request.finish_reason = reason
        if request.running:
            self.running.remove(request)
            n_tokens = request.num_committed if keep else 0
            self.pages.release(request.sequence, request.tokens, n_tokens)
        else:
            self.waiting.remove(request)

    def next_batch(self, in_flight: bool = False) -> list[Chunk] | None:
        """The chunks of the next step, those of length 1 first; empty if there is no work.

        They are marked as computed. in_flight: a step is running whose results are not known.
        None: a request must be retracted, which needs these results; call again when they are
        known.
        """
        displaced = self._find_displaced()
        if displaced is not None:
            if in_flight:
                return None
            self._displace(displaced)
        decodes: list[Request] = []
        for request in tuple(self.running):
            if request.running and request.remaining and request.budget > 0:
                if request.grammar is not None and request.num_pending:
                    continue  # what may follow depends on the token of the running step
                if not self._grow(request, in_flight):
                    if in_flight:
                        return None
                elif request.remaining == 1:
                    decodes.append(request)
        batch = [self._launch(request, 1) for request in decodes]
        room = self.max_batch_tokens - len(batch)
        for request in self.running:
            if not room:
                break
            if request.remaining > 1:
                batch.append(self._launch(request, min(request.remaining, room)))
                room -= batch[-1].length
        for request in self._admitted() if room else ():
            batch.append(self._launch(request, min(request.remaining, room)))
            room -= batch[-1].length
            if not room:
                break
        self._headroom = max(self.pages.page_size, self._headroom * _DECAY)
        self._n_steps += 1
        assert batch or in_flight or not self.busy, "there is work but nothing can run"
        return sorted(batch, key=lambda chunk: chunk.length > 1)

    def commit(self, chunk: Chunk) -> None:
        """Record that the step of `chunk` has succeeded; call it before appending the sampled
        token."""
        request = chunk.request
        request.num_committed = chunk.end
        if chunk.end >= len(request.prompt) and chunk.start < len(request.prompt):
            self.pages.commit(request.sequence, request.tokens, chunk.end)
        self.pages.slide(request.sequence, request.num_computed)

    def retract_all(self) -> None:
        """Move all running requests to the queue and discard their pages. No step may be
        running."""
        while self.running:
            self._retract(self.running[-1], keep=False)

    def check(self) -> None:
        """Assert the invariants: order, limits, and no page lost or shared."""
        assert self.waiting == sorted(self.waiting, key=_rank)
        assert self.running == sorted(self.running, key=_rank)
        assert len(self.running) <= self.max_running
        for request in self.waiting:
            assert not (request.running or request.num_computed or request.num_pending)
            assert not request.sequence.pages
            assert request.num_overtaken <= self.max_overtaken, "a request starves"
        for request in self.running:
            held = len(request.sequence.pages)
            assert request.num_committed <= request.num_computed <= held * self.pages.page_size
            assert held <= self.pages.pages_for(request.num_tokens), "more is held than used"
            assert 0 <= request.num_pending <= 1
        self.pages.check(request.sequence for request in self.running)

    def _launch(self, request: Request, length: int) -> Chunk:
        samples = length == request.remaining
        index = request.n_output + request.num_pending
        chunk = Chunk(request, request.num_computed, length, samples, index)
        request.num_computed += length
        request.num_pending += samples
        return chunk

    def _enqueue(self, request: Request) -> None:
        limit = len(request.tokens) - 1  # one must be computed, for its logits
        scored = len(request.prompt_logprobs)
        if request.params.scored_prompt is not None and scored < len(request.prompt) - 1:
            limit = min(limit, scored)
        request.key = self.pages.key_of(request.tokens, limit)
        request.match = (-1, 0)
        request.queued_at = self._n_steps
        bisect.insort(self.waiting, request, key=_rank)

    def _admitted(self) -> Iterator[Request]:
        """Move waiting requests to the running ones, while they fit and the caller iterates."""
        if not self.waiting or len(self.running) >= self.max_running:
            return
        refused = 0
        for request in self._candidates():
            if len(self.running) >= self.max_running or refused == _MOST_REFUSED:
                return
            if not request.aged and self._awaits_prefix(request):
                continue
            if not self._admit(request):
                refused += 1
                if request.aged:
                    return
                continue
            aged = self._count_overtaken(request)
            yield request
            if aged:
                return

    def _candidates(self) -> list[Request]:
        """The first waiting requests in the order of admission."""
        running = Counter(request.group for request in self.running)
        shares: dict[Request, int] = {}
        for request in self.waiting[:_MOST_SCANNED]:
            shares[request] = 0 if request.aged else running[request.group]
            running[request.group] += 1
        first = heapq.nsmallest(
            _MOST_SORTED, shares, lambda r: (not r.aged, -r.priority, shares[r], r.number)
        )
        version = self.pages.prefixes.version
        for request in first:
            if request.match[0] != version:
                request.match = (version, self.pages.prefixes.match(request.key))
        first.sort(
            key=lambda r: (
                not r.aged, -r.priority, shares[r], 0 if r.aged else -r.match[1], r.number
            )
        )  # fmt: skip
        return first

    def _find_displaced(self) -> Request | None:
        """The request to retract for a group that had nothing running for too long: the last one
        of the group with the most running ones."""
        if not self.waiting or len(self.running) < 2:
            return None
        running = Counter(request.group for request in self.running)
        ((group, most),) = running.most_common(1)
        if most < 2:
            return None
        last = next(request for request in reversed(self.running) if request.group is group)
        patient = self._n_steps - self.patience
        for request in self.waiting[:_MOST_SCANNED]:
            late = not running[request.group] and request.queued_at <= patient
            if late and request.priority >= last.priority:
                return last
        return None

    def _displace(self, request: Request) -> None:
        """Retract a request. Those that wait are patient for some more steps."""
        self._retract(request, crowded=False)
        for other in self.waiting:
            other.queued_at = max(other.queued_at, self._n_steps - self.patience // 2)

    def _awaits_prefix(self, request: Request) -> bool:
        """Whether a running prompt will soon provide pages that are worth waiting for."""
        if not self.pages.prefixes.reuses or self.pages.window:
            return False
        size = self.pages.page_size
        for leader in self.running:
            left = len(leader.prompt) - leader.num_committed
            if left > 0:
                shared = common_pages(request.key, leader.key, size * TOKEN_BYTES)
                if 2 * (shared - request.match[1]) * size >= left:
                    return True
        return False

    def _admit(self, request: Request) -> bool:
        n_tokens = len(request.tokens)
        spare = sum(self._growth(one) for one in self.running) + self._growth(request)
        if not self.running:
            spare = 0  # a single request always fits
        if not self.pages.admit(request.sequence, request.key, n_tokens, spare):
            return False
        self.waiting.remove(request)
        bisect.insort(self.running, request, key=_rank)
        cached = request.sequence.n_shared * self.pages.page_size
        request.num_computed = request.num_committed = cached
        if request.num_cached is None:
            request.num_cached = cached
            self.n_prompt_tokens += len(request.prompt)
            self.n_cached_tokens += cached
        return True

    def _growth(self, request: Request) -> int:
        """Pages that `request` may still need for the tokens of the headroom."""
        tokens = request.num_tokens
        more = min(int(self._headroom), request.budget)
        held = len(request.sequence.pages) or self.pages.pages_for(tokens)
        return max(0, self.pages.pages_for(tokens + more) - held)

    def _count_overtaken(self, admitted: Request) -> bool:
        """Count for all that arrived earlier. True if one of them must be next now."""
        aged = []
        served = {request.group for request in self.running}
        for request in self.waiting:
            if request.group in served:
                continue  # another one of its call is running
            if request.number < admitted.number and not request.aged:
                request.num_overtaken += 1
                if request.num_overtaken >= self.max_overtaken:
                    aged.append(request)
        for request in aged:
            self.waiting.remove(request)
            request.aged = True
            bisect.insort(self.waiting, request, key=_rank)
        return bool(aged)

    def _grow(self, request: Request, in_flight: bool) -> bool:
        """Allocate memory for the newest token. False if the request was, or must be, retracted."""
        while not self.pages.grow(request.sequence, request.num_tokens):
            if in_flight:
                return False
            last = self.running[-1]
            self._retract(last)
            if last is request:
                return False
        return True

    def _retract(self, request: Request, keep: bool = True, crowded: bool = True) -> None:
        assert not request.num_pending, "its token is still to come"
        self.running.remove(request)
        n_tokens = request.num_committed if keep else 0
        self.pages.release(request.sequence, request.tokens, n_tokens)
        request.num_computed = request.num_committed = 0
        request.num_retracted += 1
        self.n_retracted += 1
        if crowded:  # there were too few pages
            self._headroom = min(2 * self._headroom, _MOST_HEADROOM)
        self._enqueue(request)

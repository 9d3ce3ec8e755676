"""Runs steps: forward pass, then sampling, one step after another.

Steps are started in order and their results are read later. A step whose tokens the previous step
has yet to sample reads them here, on the device. On a GPU kernel launches are asynchronous; the
results of a step are copied to the host after its kernels, so that reading them does not wait for
the next step. On a CPU a thread computes (torch releases the interpreter's lock while it does), or
the caller itself: then a step is complete when it is started.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from serve.cache.routing_cache import RoutingCache
from serve.engine.batch import StepPlan
from serve.engine.logprobs import Scores, join, score
from serve.engine.request import Request
from serve.engine.runner import ModelRunner
from serve.engine.sampler import Sampled, Sampler, SamplingPlan

Result = tuple[Sampled | None, Scores | None]
"""Results of the sampled rows, and the scores of prompts; on the host."""


@dataclass(frozen=True)
class _Copied:
    """A result that is being copied to the host."""

    result: Result
    arrived: torch.cuda.Event | None


@dataclass(frozen=True)
class StepUnderWay:
    """A step that was started."""

    plan: StepPlan
    future: "Future[_Copied]"
    places: dict[Request, int] = field(default_factory=dict)
    """Indices of requests among the sampled ones."""

    def result(self) -> Result:
        """Wait for the result. Raises the exception that the step raised."""
        copied = self.future.result()
        if copied.arrived is not None:
            copied.arrived.synchronize()
        return copied.result


class StepExecutor:
    """threaded: compute in a separate thread."""

    def __init__(
        self,
        runner: ModelRunner,
        sampler: Sampler,
        routing: RoutingCache | None,
        threaded: bool,
    ) -> None:
        self.runner = runner
        self.sampler = sampler
        self.routing = routing
        self._thread = ThreadPoolExecutor(1, "device") if threaded else None
        self._last_tokens: Tensor | None = None

    def start(self, plan: StepPlan, prepare: Callable[[], SamplingPlan] | None) -> StepUnderWay:
        """Compute a step after those that were started earlier.

        prepare: prepares the sampling; None if nothing is sampled. It is called in this thread,
        if possible after the forward pass was started: it may wait for grammars.
        """
        places = {chunk.request: r for r, chunk in enumerate(plan.sampled)}
        if self._thread is not None:
            known = None if prepare is None else prepare()
            later = None if known is None else lambda: known
            return StepUnderWay(plan, self._thread.submit(self._compute, plan, later), places)
        future: Future[_Copied] = Future()
        try:
            future.set_result(self._compute(plan, prepare))
        except Exception as error:
            future.set_exception(error)
        return StepUnderWay(plan, future, places)

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown()

    @torch.inference_mode()
    def _compute(self, plan: StepPlan, prepare: Callable[[], SamplingPlan] | None) -> _Copied:
        parts: list[Scores] = []
        most = max((row.top for row in plan.scored), default=0)

        def score_prompts(first: int, logits_nV: Tensor) -> None:
            some = plan.scored[first : first + len(logits_nV)]
            targets = torch.tensor([row.token for row in some], device=logits_nV.device)
            parts.append(score(logits_nV, targets, most, self.sampler.n_tokens))

        batch, last_tokens = plan.batch, self._last_tokens
        self._last_tokens = None
        if plan.unknown:
            if last_tokens is None:  # that step failed, so results for its requests are ignored
                last_tokens = torch.zeros(
                    1 + max(place for _, place in plan.unknown), dtype=torch.int64
                )
            rows, places = torch.tensor(plan.unknown, device=last_tokens.device).T
            tokens = batch.tokens.to(last_tokens.device)
            tokens[rows] = last_tokens[places]
            batch = replace(batch, tokens=tokens)
        logits_RV = self.runner.run(batch, score_prompts, self._recorder(plan))
        sampled = None
        if prepare is not None:
            sampled = self.sampler.sample(logits_RV, prepare())
            self._last_tokens = sampled.tokens_R
        return _to_host((sampled, join(parts) if parts else None))

    def _recorder(self, plan: StepPlan) -> Callable[[Tensor], None] | None:
        routing = self.routing
        if routing is None:
            return None
        slots_T = plan.batch.slots(routing.page_size)
        return lambda ids_LTK: routing.write(slots_T, ids_LTK)


def _to_host(result: Result) -> _Copied:
    """Start copying to the host, without waiting for it."""
    sampled, scores = result
    if sampled is not None:
        own = None if sampled.scores is None else _host_scores(sampled.scores)
        tokens_R, best_R = _host(sampled.tokens_R), _host(sampled.best_R)
        on_gpu = sampled.tokens_R.is_cuda
        sampled = replace(sampled, tokens_R=tokens_R, best_R=best_R, scores=own)
    if scores is not None:
        on_gpu = scores.own_R.is_cuda
        scores = _host_scores(scores)
    arrived = None
    if (sampled is not None or scores is not None) and on_gpu:
        arrived = torch.cuda.Event()
        arrived.record()
    return _Copied((sampled, scores), arrived)


def _host_scores(scores: Scores) -> Scores:
    return Scores(_host(scores.own_R), _host(scores.top_values), _host(scores.top_ids))


def _host(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)

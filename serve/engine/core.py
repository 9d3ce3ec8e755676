"""The engine's core: scheduler, model, sampler and detokenizer, one step at a time.

A step gets a batch from the scheduler, converts it to tensors, computes it, and reads the results:
a token for every request whose newest token was computed. This module does not depend on HTTP or
threads; tests and benchmarks call `step`, otherwise `serve.frontend.thread` calls it.

An error in one request ends that request; an error in the forward pass ends those of its batch. The
engine itself continues.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.model import ModelConfig
from serve.cache.allocator import PageAllocator
from serve.cache.kv_cache import KvCache, build_cache, free_memory
from serve.cache.kv_publisher import KvEventPublisher, check_endpoints
from serve.cache.manager import PageManager, freed_window
from serve.cache.prefix_cache import NaiveCache
from serve.cache.radix import RadixCache
from serve.cache.routing_cache import MAX_EXPERTS, RoutingCache
from serve.cuda.runner import CudaRunner
from serve.engine.batch import StepPlan, plan_step
from serve.engine.executor import StepExecutor, StepUnderWay
from serve.engine.input_processor import EngineInfo, InputProcessor
from serve.engine.loading import Export, load_update
from serve.engine.logprobs import Scores
from serve.engine.rank_group import RankRunner
from serve.engine.request import FinishReason, Output, Request, SamplingParams, TokenLogprob
from serve.engine.runner import ModelRunner
from serve.engine.sampler import Sampled, Sampler
from serve.engine.scheduler import Chunk, Scheduler
from serve.grammar.steps import GrammarSteps

log = logging.getLogger("serve")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Sizes and modes of the engine; each is an option of `python -m serve`."""

    max_running: int = 16
    """Requests computed together."""
    max_waiting: int = 256
    """Requests that may wait; further ones are rejected with 429."""
    max_batch_tokens: int = 512
    """Tokens per step: longer prompts are cut into chunks of the tokens left after decodes."""
    kv_tokens: int = 0
    """Capacity of the KV cache. 0: `max_running` requests of full length, if memory allows."""
    page_size: int = 16
    """Tokens per page of the KV cache."""
    cache: Literal["radix", "naive"] = "radix"
    """`radix`: computed prefixes are reused. `naive`: they are not."""
    overlap: Literal["auto", "on", "off"] = "auto"
    """Choose and prepare the next batch while the device computes. `auto`: on a GPU."""
    routed_experts: bool = False
    """Store the experts of every token, for requests with `return_routed_experts`."""
    absorb_mla: bool = False
    """MLA multiplies queries and outputs by the projection of keys and values instead of
    expanding the cached latents: less work per key, but the last bits differ from training. CUDA
    always computes this form."""
    jump_forward: Literal["on", "off"] = "on"
    """Append tokens that a grammar forces without a forward pass each."""
    cuda_graphs: Literal["auto", "off"] = "auto"
    """`auto`: a GPU computes steps that only decode as CUDA graphs. `off`: it launches every
    kernel."""
    kv_events: str = ""
    """ZeroMQ endpoint at which events of the prefix cache are published; empty: nowhere."""
    kv_events_replay: str = ""
    """ZeroMQ endpoint at which subscribers request events that they missed."""

    def __post_init__(self) -> None:
        for name in ("max_running", "max_waiting", "page_size"):
            _check(name, getattr(self, name), 1, 1 << 16)
        _check("max_batch_tokens", self.max_batch_tokens, 1, 1 << 20)
        _check("kv_tokens", self.kv_tokens, 0, 1 << 40)
        if self.cache not in ("radix", "naive"):
            raise UserError(f"--cache {self.cache}: must be radix or naive")
        if self.overlap not in ("auto", "on", "off"):
            raise UserError(f"--overlap {self.overlap}: must be auto, on or off")
        if self.jump_forward not in ("on", "off"):
            raise UserError(f"--jump-forward {self.jump_forward}: must be on or off")
        if self.cuda_graphs not in ("auto", "off"):
            raise UserError(f"--cuda-graphs {self.cuda_graphs}: must be auto or off")
        check_endpoints(self.kv_events, self.kv_events_replay, self.cache)
        if self.max_batch_tokens < self.max_running:
            raise UserError(
                f"--max-batch-tokens {self.max_batch_tokens}: must be at least "
                f"--max-running {self.max_running}, for every running request needs one per step"
            )
        if 0 < self.kv_tokens < self.page_size:
            raise UserError(
                f"--page-size {self.page_size}: must not exceed --kv-tokens {self.kv_tokens}"
            )


def _check(name: str, value: object, low: int, high: int) -> None:
    option = "--" + name.replace("_", "-")
    if type(value) is not int:
        raise UserError(f"{option} {value}: must be an integer")
    if not low <= value <= high:
        raise UserError(f"{option} {value}: must lie between {low} and {high}")


def make_cache(export: Export, options: EngineOptions) -> KvCache:
    """The KV cache of an export, on each of its ranks. Raises UserError if an option does not fit
    the model or the memory."""
    model, group = export.model.config, export.group
    if options.absorb_mla and model.attention.kind != "mla":
        raise UserError("--absorb-mla: the model has no multi-head latent attention")
    no_experts = not _moe_layers(model) or model.moe.n_experts > MAX_EXPERTS
    if options.routed_experts and no_experts:
        raise UserError("--routed-experts: the model has no experts, or more than 65536")
    return build_cache(
        model if group is None else group.local_model(model),
        kv_tokens=options.kv_tokens,
        page_size=options.page_size,
        wanted=options.max_running * (export.max_length + options.page_size),
        dtype=export.dtype,
        device=export.device,
        free=None if group is None else group.least_memory(free_memory(export.device)),
    )


def make_runner(export: Export, cache: KvCache, options: EngineOptions) -> ModelRunner:
    """The runner of an export, on each of its ranks."""
    if export.group is not None:
        return RankRunner(export.model, cache, options.absorb_mla, export.group)
    if export.device.type == "cuda":
        max_running = options.max_running if options.cuda_graphs != "off" else 0
        return CudaRunner(export.model, cache, max_running, cache.pages_for(export.max_length))
    return ModelRunner(export.model, cache, options.absorb_mla)


def _moe_layers(model: ModelConfig) -> tuple[int, ...]:
    return tuple(layer for layer in range(model.n_layers) if model.is_moe(layer))


class EngineCore:
    """Model, cache and scheduler of one export. One thread at a time may call its methods."""

    def __init__(self, export: Export, options: EngineOptions) -> None:
        self.export = export
        self.options = options
        self.cache = make_cache(export, options)
        self.allocator = PageAllocator(self.cache.n_pages)
        self.kv_events: KvEventPublisher | None = None
        if options.kv_events:
            endpoints = options.kv_events, options.kv_events_replay
            self.kv_events = KvEventPublisher(options.page_size, *endpoints)
        self.pages = self._manage_pages()
        self.scheduler = Scheduler(
            self.pages,
            max_running=options.max_running,
            max_batch_tokens=options.max_batch_tokens,
            max_waiting=options.max_waiting,
        )
        self.routing = self._record_routing() if options.routed_experts else None
        vocab = export.model.config.vocab_size
        self.sampler = Sampler(
            min(vocab, export.highest_token + 1),
            export.end_tokens,
            options.max_running,
            export.device,
        )
        self.inputs = InputProcessor(self._describe(), export.tokenizer)
        self.grammars = self.inputs.grammars
        self.grammar_steps = GrammarSteps(self.grammars)
        self.n_jumped = 0
        """Tokens appended by jump-forward."""
        self.n_generated = 0
        on_gpu = export.device.type == "cuda"
        self.overlap = on_gpu if options.overlap == "auto" else options.overlap == "on"
        self.executor = StepExecutor(
            make_runner(export, self.cache, options),
            self.sampler,
            self.routing,
            threaded=self.overlap and not on_gpu,
        )
        self._under_way: StepUnderWay | None = None
        if export.group is not None:
            export.group.begin()

    def _manage_pages(self) -> PageManager:
        size, window = self.options.page_size, freed_window(self.export.model.config)
        if self.options.routed_experts:
            window = 0  # the stored experts would be lost with the page
        radix = self.options.cache == "radix"
        return PageManager(
            self.allocator,
            RadixCache(self.allocator, size, window, self.kv_events) if radix else NaiveCache(),
            size,
            self.options.max_running,
            min(self.allocator.n_pages - 1, -(-self.export.max_length // size)),
            window,
        )

    def _record_routing(self) -> RoutingCache:
        model, size, device = self.export.model.config, self.options.page_size, self.export.device
        n_layers = len(_moe_layers(model))
        return RoutingCache(self.cache.n_pages, size, n_layers, model.moe.top_k, device)

    def _describe(self) -> EngineInfo:
        export, options, model = self.export, self.options, self.export.model.config
        moe_layers = _moe_layers(model)
        return EngineInfo(
            name=export.name,
            dtype=str(export.dtype).removeprefix("torch."),
            device=str(export.device),
            cache=self.cache.describe(),
            ranks="" if export.group is None else str(export.group),
            tp=1 if export.group is None else export.group.dims.tp,
            max_length=export.max_length,
            longest=min(export.max_length, self.cache.capacity + 1),
            capacity=self.cache.capacity,
            page_size=options.page_size,
            vocab_size=model.vocab_size,
            n_sampled=self.sampler.n_tokens,
            end_tokens=export.end_tokens,
            max_running=options.max_running,
            max_waiting=options.max_waiting,
            routed_experts=options.routed_experts,
            moe_layers=moe_layers,
            n_experts=model.moe.n_experts if moe_layers else 0,
            top_k=model.moe.top_k if moe_layers else 0,
            model_type=export.model_type,
            architectures=export.architectures,
        )

    @property
    def busy(self) -> bool:
        """Whether there is a step to compute or to read."""
        return self.scheduler.busy or self._under_way is not None

    def make_requests(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        priority: int = 0,
        group: object | None = None,
    ) -> list[Request]:
        """See `InputProcessor.make_requests`."""
        return self.inputs.make_requests(prompt, params, priority, group)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """See `InputProcessor.encode`."""
        return self.inputs.encode(text, add_special_tokens)

    def update_weights(self, folder: Path) -> list[Output]:
        """Continue with the weights of another export of the same model.

        Requests keep their tokens; everything computed with the old weights is discarded. Both
        models are in memory for a moment. Raises UserError, without any change, if the models
        differ.
        """
        if self._under_way is not None:
            wait([self._under_way.future])  # loading is a command to all ranks, as a step is
        new = load_update(self.export, folder)
        outputs = self.flush_cache()
        self.executor.runner = make_runner(new, self.cache, self.options)
        self.export = new
        return outputs

    def expert_counts(self) -> NDArray[np.int64]:
        """int64 `[MoE layers, experts]`: how often every expert was chosen since the weights were
        loaded. With several ranks, between two steps only."""
        return self.executor.runner.expert_counts()

    def flush_cache(self) -> list[Output]:
        """Remove all cached prefixes. Running requests recompute theirs.

        Returns the outputs of the step that was running.
        """
        outputs = self.drain()
        self.scheduler.retract_all()
        self.pages.prefixes.clear()
        return outputs

    def step(self) -> list[Output]:
        """Compute one batch. Returns nothing if there is no work, or if prompts are only partly
        computed.

        With overlap, the outputs are those of the previous step: the next batch is chosen and
        prepared while the device computes, and its results are read during the following step. A
        request that ended in the meantime is computed once more, and the result is ignored.
        """
        before = self._under_way
        chunks = self.scheduler.next_batch(in_flight=before is not None)
        after = self._start(chunks, before) if chunks else None
        if before is after is None and self.export.group is not None:
            self.export.group.beat()
        if before is not None:
            self._under_way = after
            return self._finish(before)
        if self.overlap or after is None:
            self._under_way = after
            return []
        return self._finish(after)

    def drain(self) -> list[Output]:
        """Finish the running step, if there is one."""
        before, self._under_way = self._under_way, None
        return [] if before is None else self._finish(before)

    def close(self) -> None:
        """End the thread of the device, and let the other ranks end. No step may be running."""
        self.executor.close()
        self.inputs.close()
        if self.kv_events is not None:
            self.kv_events.close()
        if self.export.group is not None:
            self.export.group.stop()

    def _start(self, chunks: list[Chunk], before: StepUnderWay | None) -> StepUnderWay:
        places = {} if before is None else before.places
        plan = plan_step(chunks, self.pages, places)
        prepare = self.grammar_steps.begin(plan.sampled, self.sampler.plan)
        return self.executor.start(plan, prepare)

    def _finish(self, step: StepUnderWay) -> list[Output]:
        try:
            return self._read(step.plan, *step.result())
        except Exception:
            chunks = step.plan.chunks
            log.exception("a step failed; its %d requests end with an error", len(chunks))
            return [self._fail(c.request) for c in chunks if c.request.finish_reason is None]

    def _read(
        self, plan: StepPlan, sampled: Sampled | None, prompt_scores: Scores | None
    ) -> list[Output]:
        """Commit the computed chunks, and append tokens and scores to requests."""
        if prompt_scores is not None:
            rows = plan.scored
            found = prompt_scores.read([row.token for row in rows], [row.top for row in rows])
            for row, one in zip(rows, found, strict=True):
                row.request.prompt_logprobs.append(one)
        tokens: dict[Request, tuple[int | None, TokenLogprob | None]] = {}
        if sampled is not None:
            tokens = sampled.read(plan.sampled)
        complete = self.grammar_steps.accept(tokens, self.export.end_tokens)
        outputs = []
        for chunk in plan.chunks:
            request = chunk.request
            request.num_pending -= chunk.samples
            if request.finish_reason is not None:
                continue  # it ended during the step
            token, logprob = tokens.get(request, (None, None))
            ended = request in complete  # by its grammar, before this token
            try:
                error = None if request.grammar is None else request.grammar.error
                if chunk.samples and not ended and (token is None or error is not None):
                    log.error("request %d: %s", request.number, error or "logits are not finite")
                    outputs.append(self._fail(request))
                    continue
                self.scheduler.commit(chunk)
                if ended or token is not None:
                    outputs.append(self._append(request, None if ended else token, logprob))
            except Exception:
                log.exception("request %d ends with an error", request.number)
                outputs.append(self._fail(request))
        return outputs

    def _append(self, request: Request, token: int | None, logprob: TokenLogprob | None) -> Output:
        """Append the next token to a request, and those that its grammar forces after it. None: it
        is complete.

        Scores and experts are those of each token, so with them no token is left out of a step."""
        params = request.params
        if params.max_tokens == 0 or token is None:
            # of max_tokens 0 the step computed the prompt, which is all that was requested
            end: FinishReason = "length" if params.max_tokens == 0 else "stop"
            self._report_experts(request, len(request.tokens) - (params.max_tokens > 0))
            self.scheduler.finish(request, end)
            text = "" if request.text is None else request.text.finish()
            return Output(request, text, [], [], end)
        jumps = self.options.jump_forward == "on" and not params.is_reported_by_token
        tokens, text, reason = request.extend(token, self.export.end_tokens, jumps)
        self.n_jumped += len(tokens) - 1
        self.n_generated += len(tokens)
        if reason is not None:
            self._report_experts(request, len(request.tokens) - 1)
            self.scheduler.finish(request, reason)
        return Output(request, text, tokens, [] if logprob is None else [logprob], reason)

    def _report_experts(self, request: Request, n_tokens: int) -> None:
        if request.params.return_routed_experts and self.routing is not None:
            request.routed_experts = self.routing.read(request.sequence.pages, n_tokens)

    def _fail(self, request: Request) -> Output:
        self.scheduler.finish(request, "error", keep=False)
        return Output(request, "", [], [], "error")

"""The engine: model, cache, scheduler and sampler, one step at a time.

A step asks the scheduler for a batch, runs it, chooses a token for every request whose newest
token was reached, and says what came of it. Nothing here knows of HTTP or threads: a test, a
benchmark or an offline run calls `step` or `generate`, the server calls it from `serve.api.thread`.

A fault in one request ends that request; a fault in the forward pass ends those of its batch. The
engine itself goes on.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from configs.errors import UserError
from serve.cache.kv_cache import build_cache
from serve.engine.batch import lay_out
from serve.engine.detokenizer import TextStream
from serve.engine.loading import Export
from serve.engine.request import (
    FinishReason,
    Output,
    Request,
    RequestError,
    SamplingParams,
    TokenLogprob,
)
from serve.engine.rows import Row, wanted_rows
from serve.engine.runner import ModelRunner
from serve.engine.sampler import choose, score
from serve.engine.scheduler import Chunk, Scheduler

log = logging.getLogger("serve")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Sizes of the engine; each is an option of `python -m serve`."""

    max_running: int = 16
    """Requests computed together."""
    max_waiting: int = 256
    """Requests that may wait; more are refused with 503."""
    max_batch_tokens: int = 512
    """Tokens per step: longer prompts are cut into chunks of what the decodes leave."""
    kv_tokens: int = 0
    """Capacity of the KV cache. 0: `max_running` requests of full length, if memory allows."""
    page_size: int = 16
    """Tokens per page of the KV cache."""

    def __post_init__(self) -> None:
        for name in ("max_running", "max_waiting", "page_size"):
            _check(name, getattr(self, name), 1, 1 << 16)
        _check("max_batch_tokens", self.max_batch_tokens, 1, 1 << 20)
        _check("kv_tokens", self.kv_tokens, 0, 1 << 40)
        if self.max_batch_tokens < self.max_running:
            raise UserError(
                f"--max-batch-tokens {self.max_batch_tokens}: must be at least "
                f"--max-running {self.max_running}, for every running request needs one per step"
            )


def _check(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        option = "--" + name.replace("_", "-")
        raise UserError(f"{option} {value}: must lie between {low} and {high}")


@dataclass
class Completion:
    """The whole answer to one prompt of `Engine.generate`."""

    prompt: list[int]
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class Engine:
    """Model, cache and scheduler of one export. One thread at a time may call `step`."""

    def __init__(self, export: Export, options: EngineOptions) -> None:
        self.export = export
        self.cache = build_cache(
            export.model.config,
            kv_tokens=options.kv_tokens,
            page_size=options.page_size,
            wanted=options.max_running * (export.max_length + options.page_size),
            dtype=export.dtype,
            device=export.device,
        )
        self.scheduler = Scheduler(
            self.cache,
            max_running=options.max_running,
            max_batch_tokens=options.max_batch_tokens,
            max_waiting=options.max_waiting,
        )
        self.runner = ModelRunner(export.model, self.cache)

    def make_request(self, prompt: Sequence[int], params: SamplingParams) -> Request:
        """A request, not yet queued. RequestError where the engine could never serve it."""
        vocab = self.export.model.config.vocab_size
        if not prompt:
            raise RequestError("the prompt is empty", "prompt")
        if not all(type(token) is int and 0 <= token < vocab for token in prompt):
            raise RequestError(f"token ids must lie between 0 and {vocab - 1}", "prompt")
        longest = min(self.export.max_length, self.cache.capacity + 1)
        if len(prompt) + params.max_tokens > longest:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens and max_tokens is {params.max_tokens}; "
                f"together at most {longest} are possible",
                "prompt",
                code="context_length_exceeded",
            )
        tokenizer = self.export.tokenizer
        if tokenizer is None and params.stop:
            raise RequestError("this model has no tokenizer; stop strings need one", "stop")
        text = None if tokenizer is None else TextStream(tokenizer, params.stop)
        return Request(list(prompt), params, text)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text prompt, with the begin token where the tokenizer adds one."""
        if self.export.tokenizer is None:
            raise RequestError("this model has no tokenizer; send token ids", "prompt")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RequestError("the prompt is not valid Unicode", "prompt") from None
        tokens: list[int] = self.export.tokenizer.encode(text).ids
        return tokens

    def step(self) -> list[Output]:
        """Compute one batch. Empty where there is nothing to do, or where prompts only began."""
        batch = self.scheduler.next_batch()
        if not batch:
            return []
        try:
            rows, places = _rows(batch)
            chunks = [(c.request.tokens[c.start : c.end], c.start, c.request.pages) for c in batch]
            logits_RV = self.runner.run(lay_out(chunks, self.cache.page_size, places))
            for chunk in batch:
                chunk.request.computed = chunk.end
            return self._read(logits_RV, rows)
        except Exception:
            log.exception("a step failed; its %d requests end with an error", len(batch))
            return [self._fail(chunk.request) for chunk in batch]

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
    ) -> list[Completion]:
        """Complete many prompts, text or token ids, without a server; batched as they fit."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        requests = [
            self.make_request(self.encode(prompt) if isinstance(prompt, str) else prompt, p)
            for prompt, p in zip(prompts, each, strict=True)
        ]
        found = {request: Completion(request.prompt) for request in requests}
        self.scheduler.add(requests)
        while self.scheduler.busy:
            for output in self.step():
                completion = found[output.request]
                completion.text += output.text
                completion.tokens += output.tokens
                completion.logprobs += output.logprobs
                completion.finish_reason = output.finish_reason
        return list(found.values())

    def _read(self, logits_RV: torch.Tensor, rows: Sequence[Row]) -> list[Output]:
        """Score prompts, choose tokens, and finish what has come to its end."""
        sampling = [r for r, row in enumerate(rows) if row.samples]
        tokens: dict[int, int | None] = {}
        if sampling:
            requests = [rows[r].request for r in sampling]
            every = len(sampling) == len(rows)
            logits = logits_RV if every else logits_RV[torch.tensor(sampling)]
            tokens = dict(zip(sampling, choose(logits, requests), strict=True))
        logprobs = self._score(logits_RV, rows, tokens)
        outputs = []
        for r, row in enumerate(rows):
            if not row.samples:
                row.request.prompt_logprobs.append(logprobs[r])
        for r, token in tokens.items():
            request = rows[r].request
            try:
                outputs.append(self._append(request, token, logprobs.get(r)))
            except Exception:
                log.exception("request %d ends with an error", request.number)
                outputs.append(self._fail(request))
        return outputs

    def _score(
        self, logits_RV: torch.Tensor, rows: Sequence[Row], tokens: dict[int, int | None]
    ) -> dict[int, TokenLogprob]:
        """Log-probabilities of the rows that report them, by row."""
        wanted: dict[int, tuple[int, int]] = {}
        for r, row in enumerate(rows):
            token = tokens[r] if row.samples else row.request.tokens[row.position + 1]
            top = row.request.params.logprobs
            if top is not None and token is not None:
                wanted[r] = token, top
        if not wanted:
            return {}
        picked = logits_RV[torch.tensor(list(wanted))]
        found = score(picked, [t for t, _ in wanted.values()], [n for _, n in wanted.values()])
        return dict(zip(wanted, found, strict=True))

    def _append(self, request: Request, token: int | None, logprob: TokenLogprob | None) -> Output:
        """Give a request its next token. None: the model failed it."""
        if token is None:
            log.error("request %d: the logits are not finite", request.number)
            return self._fail(request)
        request.tokens.append(token)
        text, stream = "", request.text
        ended = token in self.export.end_tokens and not request.params.ignore_eos
        if stream is not None and not ended:
            text = stream.add(token)
        reason: FinishReason | None = None
        if ended or (stream is not None and stream.stopped):
            reason = "stop"
        elif request.n_output == request.params.max_tokens:
            reason = "length"
        if reason is not None:
            if stream is not None:
                text += stream.finish()
                reason = "stop" if stream.stopped else reason
            self.scheduler.finish(request, reason)
        return Output(request, text, [token], [] if logprob is None else [logprob], reason)

    def _fail(self, request: Request) -> Output:
        self.scheduler.finish(request, "error")
        return Output(request, "", [], [], "error")


def _rows(batch: Sequence[Chunk]) -> tuple[list[Row], list[int]]:
    """The rows that somebody reads, and their places among the tokens of the step."""
    rows: list[Row] = []
    places: list[int] = []
    first = 0
    for chunk in batch:
        for row in wanted_rows(chunk):
            rows.append(row)
            places.append(first + row.position - chunk.start)
        first += chunk.length
    return rows, places

"""The state of one sequence in the engine.

One prompt with `n` choices is `n` requests. A request is always in exactly one state: waiting,
running, or finished. Its tokens are prompt and output in one list. The first `num_computed` of
these were part of a step, the first `num_committed` of steps that have succeeded; with overlapped
scheduling one step may be between the two, and its token (`num_pending`) is not known yet.
Retraction resets the counts to 0 and changes nothing else, so the request continues where it
stopped.
"""

import random
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from serve.cache.manager import SequencePages
from serve.engine.sampling_params import RequestError, SamplingParams
from serve.grammar.compiler import GrammarCompiler
from serve.grammar.limits import GrammarError
from serve.grammar.matcher import Grammar, GrammarState
from serve.text.detokenizer import TextStream

__all__ = ["FinishReason", "Output", "Request", "RequestError", "SamplingParams", "TokenLogprob"]

FinishReason = Literal["stop", "length", "cancelled", "error", "lost"]
"""`cancelled`: by the client or the end of the server. `error`: inside its step. `lost`: the
engine's process ended."""


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithms of the model's probabilities (before temperature)."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    """The most likely tokens, best first."""


@dataclass(eq=False)
class Request:
    """One sequence. Only the engine's thread changes it after it was submitted."""

    prompt: list[int]
    params: SamplingParams
    text: TextStream | None
    """None if there is no tokenizer."""
    priority: int = 0
    """Larger numbers are served first."""
    group: object = field(default_factory=object, repr=False)
    """Requests of one call have the same; calls get equal shares of the running requests."""
    compiling: Future[Grammar] | None = field(default=None, repr=False)
    """The grammar of the output, if there is one; see `start_grammars`."""
    grammar: GrammarState | None = field(default=None, init=False, repr=False)
    """What it allows after the output so far."""
    number: int = field(default=-1, init=False)
    """Order of arrival, set by the scheduler."""
    tokens: list[int] = field(init=False)
    """Prompt and output."""
    num_computed: int = field(default=0, init=False)
    num_committed: int = field(default=0, init=False)
    num_pending: int = field(default=0, init=False)
    sequence: SequencePages = field(default_factory=SequencePages, init=False, repr=False)
    key: bytes = field(default=b"", init=False, repr=False)
    """While it waits: the key to look up in the prefix cache (`Scheduler`)."""
    match: tuple[int, int] = field(default=(-1, 0), init=False, repr=False)
    """The last match of the key, as (version of the cache, pages)."""
    queued_at: int = field(default=0, init=False)
    """While it waits: the scheduler's step since when."""
    num_overtaken: int = field(default=0, init=False)
    """Number of later requests that were admitted before it."""
    aged: bool = field(default=False, init=False)
    """Whether it was overtaken too often and is therefore next."""
    num_cached: int | None = field(default=None, init=False)
    """Tokens of the prompt found in the prefix cache at the first admission."""
    num_retracted: int = field(default=0, init=False)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list, init=False)
    """Scores of prompt tokens 1, 2, ...; token 0 has no predecessor."""
    routed_experts: NDArray[np.uint16] | None = field(default=None, init=False, repr=False)
    """`[tokens, MoE layers, top_k]` at the end, if requested. The last token is missing, since it
    was never an input of the model."""
    finish_reason: FinishReason | None = field(default=None, init=False)
    matched: str | None = field(default=None, init=False)
    """The stop string that ended it."""
    seed: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        assert self.prompt, "a prompt has at least one token"
        self.tokens = list(self.prompt)
        seed = self.params.seed
        self.seed = random.getrandbits(64) if seed is None else seed % (1 << 64)

    @property
    def running(self) -> bool:
        return self.sequence.row >= 0

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def n_output(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def num_tokens(self) -> int:
        """Number of tokens, including the one of a running step."""
        return len(self.tokens) + self.num_pending

    @property
    def remaining(self) -> int:
        """Tokens still to be computed before the next one can be sampled."""
        return len(self.tokens) + self.num_pending - self.num_computed

    @property
    def budget(self) -> int:
        """Tokens it may still generate."""
        return self.params.max_tokens - self.n_output - self.num_pending

    def ends_with(self, token: int, end_tokens: frozenset[int]) -> bool:
        """Whether `token` ends the output. end_tokens: of the model."""
        if token in self.params.stop_token_ids:
            return True
        return token in end_tokens and not self.params.ignore_eos

    def accept(self, token: int | None, end_tokens: frozenset[int]) -> bool:
        """Continue the grammar after a sampled token. False if it has none or ends here."""
        if self.grammar is None or token is None or self.finish_reason is not None:
            return False
        if self.params.max_tokens == 0 or self.ends_with(token, end_tokens):
            return False
        self.grammar.accept(token)
        return True

    def extend(
        self, token: int, end_tokens: frozenset[int], jumps: bool
    ) -> tuple[list[int], str, FinishReason | None]:
        """Append a token that `grammar` has accepted, and, with `jumps`, those that it forces after
        it. Returns the tokens, their text, and the reason if the output ends with them."""
        tokens, grammar = [token], self.grammar
        text, reason = self._append(token, end_tokens)
        while grammar is not None and grammar.forced and jumps and reason is None:
            tokens.append(grammar.forced[0])
            grammar.accept(tokens[-1])
            more, reason = self._append(tokens[-1], end_tokens)
            text += more
        return tokens, text, reason

    def _append(self, token: int, end_tokens: frozenset[int]) -> tuple[str, FinishReason | None]:
        self.tokens.append(token)
        stream, text = self.text, ""
        ended = self.ends_with(token, end_tokens)
        if stream is not None and not ended:
            text = stream.add(token, self.n_output > self.params.min_tokens)
        complete = self.grammar is not None and self.grammar.finished
        reason: FinishReason | None = None
        if ended or complete or (stream is not None and stream.stopped):
            reason = "stop"
        elif self.n_output == self.params.max_tokens:
            reason = "length"
        if reason is not None and stream is not None:
            text += stream.finish()
            reason = "stop" if stream.stopped else reason
            self.matched = stream.matcher.matched
        return text, reason


def check_tokens(
    prompt: Sequence[int],
    params: SamplingParams,
    longest: int,
    capacity: int,
    vocab: int,
    n_sampled: int,
) -> None:
    """Raise RequestError if a prompt can never be served.

    Args:
        prompt: Token ids.
        params: Its parameters.
        longest: Tokens of prompt and output together.
        capacity: Tokens of the KV cache.
        vocab: Tokens of the model.
        n_sampled: Tokens that may be sampled.
    """
    if not prompt:
        raise RequestError("the prompt is empty", "prompt")
    if len(prompt) + params.max_tokens > longest or len(prompt) > capacity:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens and max_tokens is {params.max_tokens}; "
            f"together at most {longest} are possible",
            "prompt",
            code="context_length_exceeded",
        )
    if not all(type(token) is int and 0 <= token < vocab for token in prompt):
        raise RequestError(f"token ids must lie between 0 and {vocab - 1}", "prompt")
    for name in ("logit_bias", "stop_token_ids"):
        if any(token >= n_sampled for token in getattr(params, name)):
            raise RequestError(f"tokens of {name} must lie between 0 and {n_sampled - 1}", name)


def compile_grammar(
    grammars: GrammarCompiler | None, params: SamplingParams
) -> Future[Grammar] | None:
    """The compiled grammar of an output, later; None if it has none. grammars: None without a
    tokenizer. Raises RequestError for a bad one."""
    spec, name = params.grammar_spec(), params.grammar_field
    if spec is None:
        return None
    if grammars is None:
        raise RequestError("this model has no tokenizer; a grammar needs one", name)
    try:
        return grammars.compile(spec)
    except GrammarError as error:
        raise RequestError(str(error), name, error.status) from None


def start_grammars(requests: Sequence[Request]) -> None:
    """Wait until the grammars of requests are compiled, and start them. Raises RequestError if one
    is refused."""
    for request in requests:
        if request.compiling is not None and request.grammar is None:
            try:
                request.grammar = GrammarState(request.compiling.result())
            except GrammarError as error:
                name = request.params.grammar_field
                raise RequestError(str(error), name, error.status) from None
            except CancelledError:
                raise RequestError("the server is shutting down", None, 503) from None


@dataclass(frozen=True)
class Output:
    """The result of one step for one request."""

    request: Request
    text: str
    """New text, complete characters only; empty if more tokens are needed."""
    tokens: list[int]
    logprobs: list[TokenLogprob]
    """One per token if requested, otherwise empty."""
    finish_reason: FinishReason | None

"""The state of one sequence in the engine.

One prompt with `n` choices is `n` requests. A request is always in exactly one state: waiting,
running, or finished. Its tokens are prompt and output in one list. The first `num_computed` of
these were part of a step, the first `num_committed` of steps that have succeeded; with overlapped
scheduling one step may be between the two, and its token (`num_pending`) is not known yet.
Retraction resets the counts to 0 and changes nothing else, so the request continues where it
stopped.
"""

import random
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from serve.cache.manager import SequencePages
from serve.engine.detokenizer import TextStream
from serve.engine.sampling_params import RequestError, SamplingParams

__all__ = ["FinishReason", "Output", "Request", "RequestError", "SamplingParams", "TokenLogprob"]

FinishReason = Literal["stop", "length", "cancelled", "error"]


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

"""What a client asks for, and the state of one sequence on its way through the engine.

One prompt with `n` choices is `n` requests. A request is always in exactly one place: waiting,
running, or finished. Its tokens are prompt and output in one list, of which the first `computed`
have their keys and values in the cache; preemption sets `computed` back to 0 and loses nothing
else, so the recomputed request goes on where it stopped.
"""

import math
import random
from dataclasses import dataclass, field
from typing import Literal

from serve.engine.detokenizer import TextStream

FinishReason = Literal["stop", "length", "cancelled", "error"]

MAX_TOKENS = 1 << 20
MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 5


class RequestError(ValueError):
    """A request that cannot be served. The message is one line, fit for the client to read."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        code: str = "invalid_value",
    ) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code


def _integer(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int:  # bool is an int to isinstance
        raise RequestError(f"{name} must be an integer", name, code="invalid_type")
    if not low <= value <= high:
        raise RequestError(f"{name} must lie between {low} and {high}", name)


def _number(name: str, value: object, low: float, high: float) -> None:
    if type(value) not in (int, float):
        raise RequestError(f"{name} must be a number", name, code="invalid_type")
    assert isinstance(value, int | float)
    if not (math.isfinite(value) and low <= value <= high):
        raise RequestError(f"{name} must lie between {low} and {high}", name)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Types and ranges are checked: RequestError."""

    max_tokens: int = 16
    """Most tokens to generate, the end token included."""
    temperature: float = 1.0
    """Divides the logits. 0: greedy, whatever `top_p` and `top_k` are."""
    top_p: float = 1.0
    """Sample from the fewest tokens whose probabilities reach this sum."""
    top_k: int = 0
    """Sample from this many most likely tokens. 0 or -1: from all."""
    seed: int | None = None
    """Makes the choices repeatable, whatever else is in the batch. None: never the same."""
    stop: tuple[str, ...] = ()
    """End before the first of these strings; it is not part of the text."""
    ignore_eos: bool = False
    """Go on after the end token (benchmarks)."""
    logprobs: int | None = None
    """Report the log-probability of each token and of so many most likely ones (0 to 5)."""
    echo: bool = False
    """Put the prompt in front of the text; with `logprobs`, score it as well."""

    def __post_init__(self) -> None:
        _integer("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        _number("temperature", self.temperature, 0.0, 2.0)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise RequestError("top_p must be greater than 0", "top_p")
        _integer("top_k", self.top_k, -1, 1 << 31)
        if self.seed is not None:
            _integer("seed", self.seed, -(1 << 63), (1 << 64) - 1)
        for name in ("ignore_eos", "echo"):
            if type(getattr(self, name)) is not bool:
                raise RequestError(f"{name} must be true or false", name, code="invalid_type")
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if len(self.stop) > MAX_STOPS:
            raise RequestError(f"stop takes at most {MAX_STOPS} strings", "stop")
        for text in self.stop:
            if not isinstance(text, str):
                raise RequestError("stop must be a string or strings", "stop", code="invalid_type")
            if not 1 <= len(text) <= MAX_STOP_CHARS:
                raise RequestError(f"a stop string has 1 to {MAX_STOP_CHARS} characters", "stop")

    @property
    def scores_prompt(self) -> bool:
        return self.echo and self.logprobs is not None


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithms of probabilities under the model itself (before temperature)."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    """The most likely tokens, best first."""


@dataclass(eq=False)
class Request:
    """One sequence. The engine's thread alone changes it after it was submitted."""

    prompt: list[int]
    params: SamplingParams
    text: TextStream | None
    """None where there is no tokenizer."""
    number: int = field(default=-1, init=False)
    """Order of arrival, given by the scheduler; smaller numbers are served first."""
    tokens: list[int] = field(init=False)
    """Prompt and output."""
    computed: int = field(default=0, init=False)
    """Leading tokens whose keys and values are in the cache."""
    pages: list[int] = field(default_factory=list, init=False)
    """Pages of the cache in order of position; this request alone owns them."""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list, init=False)
    """Scores of prompt tokens 1, 2, ...: nothing comes before token 0."""
    finish_reason: FinishReason | None = field(default=None, init=False)
    rng: random.Random = field(init=False, repr=False)

    def __post_init__(self) -> None:
        assert self.prompt, "a prompt has at least one token"
        self.tokens = list(self.prompt)
        self.rng = random.Random(self.params.seed)

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def n_output(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def remaining(self) -> int:
        """Tokens still to be computed before the next one can be sampled."""
        return len(self.tokens) - self.computed


@dataclass(frozen=True)
class Output:
    """What one step brought to one request."""

    request: Request
    text: str
    """New text, complete characters only; may be empty while more is needed."""
    tokens: list[int]
    logprobs: list[TokenLogprob]
    """One per token where the request asked for them, else empty."""
    finish_reason: FinishReason | None

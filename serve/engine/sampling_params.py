"""Checked parameters of sampling and of the end of a request, as clients may set them."""

from dataclasses import dataclass, field, replace
from typing import Any

from configs.errors import escaped
from serve.grammar.limits import GrammarError
from serve.grammar.spec import FIELDS, GrammarSpec, make_spec

MAX_TOKENS = 1 << 20
MAX_CHOICES = 128
MAX_STOPS = 64
MAX_STOP_CHARS = 256
MAX_STOP_TOKENS = 64
MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 1024


class RequestError(ValueError):
    """A request that cannot be served. The message is one line for the client: control characters
    are escaped, since a part of it may be from a request or a chat template."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        code: str = "invalid_value",
        retry_after: int = 1,
    ) -> None:
        super().__init__(escaped(message))
        self.param = param
        self.status = status
        self.code = code
        self.retry_after = retry_after
        """Seconds after which the same request may be accepted (429, 503)."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Types and ranges are checked. Raises RequestError.

    The logits of a token are changed in this order: the grammar, `logit_bias`, penalties,
    `min_tokens`, temperature, `top_k`, `top_p` (within the tokens that `top_k` kept), `min_p`.
    """

    max_tokens: int = 16
    """Maximum number of tokens to generate, the end token included. 0: only compute the prompt."""
    n: int = 1
    """Independent choices; they share the prompt's pages if a prefix cache is on."""
    temperature: float = 1.0
    """Divides the logits. 0: greedy, for any `top_k`, `top_p` and `min_p`."""
    top_p: float = 1.0
    """Sample from the fewest tokens whose probabilities reach this sum (arXiv:1904.09751)."""
    top_k: int = 0
    """Sample from this many most likely tokens. 0 or -1: from all."""
    min_p: float = 0.0
    """Sample from tokens with at least this share of the highest probability (arXiv:2407.01082)."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token in the output."""
    frequency_penalty: float = 0.0
    """Subtracted once for every occurrence of the token in the output."""
    repetition_penalty: float = 1.0
    """Divides the positive, multiplies the negative logits of tokens of prompt and output
    (arXiv:1909.05858)."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    seed: int | None = None
    """Makes the choices repeatable, for any other requests in the batch. None: always different."""
    stop: tuple[str, ...] = ()
    """End before the first of these strings; it is not part of the text."""
    stop_token_ids: tuple[int, ...] = ()
    """End with any of these tokens, as with the model's own end tokens."""
    ignore_eos: bool = False
    """Continue after the model's end tokens (benchmarks)."""
    min_tokens: int = 0
    """Minimum number of tokens before an end token or stop token."""
    logprobs: int | None = None
    """Report the log-probability of each token and of this many most likely ones (0 to 20) as
    computed by the model, before all of the above."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt, whose cached prefix is then computed again."""
    echo: bool = False
    """Return the prompt before the text; with `logprobs`, score it as well."""
    skip_special_tokens: bool = True
    """Omit special tokens from the text."""
    shown_special_tokens: tuple[int, ...] = ()
    """Special tokens that are in the text nevertheless."""
    return_routed_experts: bool = False
    """Report the experts of every token; the engine must be started with this option."""
    json_schema: str | dict[str, Any] | None = None
    """The text is JSON that matches this schema. At most one of this and the next four is set."""
    regex: str | None = None
    """The whole text matches this regular expression."""
    ebnf: str | None = None
    """The text is derived from the rule `root` of this grammar (EBNF of xgrammar)."""
    structural_tag: str | dict[str, Any] | None = None
    """The text has this structure of tags (structural tags of xgrammar)."""
    choices: tuple[str, ...] | None = None
    """The text is one of these."""

    def __post_init__(self) -> None:
        _integer("max_tokens", self.max_tokens, 0, MAX_TOKENS)
        _integer("n", self.n, 1, MAX_CHOICES)
        _number("temperature", self.temperature, 0.0, 2.0)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise RequestError("top_p must be greater than 0", "top_p")
        _integer("top_k", self.top_k, -1, 1 << 31)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _integer("min_tokens", self.min_tokens, 0, MAX_TOKENS)
        if self.min_tokens > self.max_tokens:
            raise RequestError("min_tokens must not exceed max_tokens", "min_tokens")
        if self.seed is not None:
            _integer("seed", self.seed, -(1 << 63), (1 << 64) - 1)
        for name in ("ignore_eos", "echo", "skip_special_tokens", "return_routed_experts"):
            if type(getattr(self, name)) is not bool:
                raise RequestError(f"{name} must be true or false", name, code="invalid_type")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        self._check_stops()
        if len(self.logit_bias) > MAX_LOGIT_BIASES:
            raise RequestError(f"logit_bias takes at most {MAX_LOGIT_BIASES} tokens", "logit_bias")
        for token, bias in self.logit_bias.items():
            _integer("a token of logit_bias", token, 0, (1 << 31) - 1, "logit_bias")
            _number("a value of logit_bias", bias, -100.0, 100.0, "logit_bias")
        given = [name for name in FIELDS if getattr(self, name) is not None]
        if len(given) > 1:
            raise RequestError(f"{given[0]} and {given[1]} exclude each other", given[1])

    def _check_stops(self) -> None:
        for name, most in (("stop", MAX_STOPS), ("stop_token_ids", MAX_STOP_TOKENS)):
            if not isinstance(getattr(self, name), tuple):
                raise RequestError(f"{name} must be a tuple", name, code="invalid_type")
            if len(getattr(self, name)) > most:
                raise RequestError(f"{name} takes at most {most}", name)
        for text in self.stop:
            if not isinstance(text, str):
                raise RequestError("stop must be a string or strings", "stop", code="invalid_type")
            if not 1 <= len(text) <= MAX_STOP_CHARS:
                raise RequestError(f"a stop string has 1 to {MAX_STOP_CHARS} characters", "stop")
        for token in self.stop_token_ids:
            _integer("a stop token", token, 0, (1 << 31) - 1, "stop_token_ids")

    @property
    def scored_prompt(self) -> int | None:
        """Number of most likely tokens to report with each prompt token; None: no scores."""
        if self.prompt_logprobs is not None:
            return self.prompt_logprobs
        return self.logprobs if self.echo else None

    @property
    def grammar_field(self) -> str | None:
        """The field that has the grammar of the output; None: there is none."""
        return next((name for name in FIELDS if getattr(self, name) is not None), None)

    def grammar_spec(self) -> GrammarSpec | None:
        """The grammar of the output. Raises RequestError for a bad one."""
        name = self.grammar_field
        if name is None:
            return None
        try:
            return make_spec(name, getattr(self, name))
        except GrammarError as error:
            raise RequestError(str(error), name, error.status) from None

    @property
    def is_reported_by_token(self) -> bool:
        """Whether results of the step of each token are reported."""
        return self.logprobs is not None or self.return_routed_experts

    @property
    def has_penalties(self) -> bool:
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)

    def choice(self, index: int) -> "SamplingParams":
        """The parameters of choice `index`: with a seed it has seed + index, so choices differ."""
        seed = None if self.seed is None else (self.seed + index) % (1 << 64)
        return replace(self, n=1, seed=seed)


def _integer(name: str, value: object, low: int, high: int, param: str = "") -> None:
    if type(value) is not int:  # bool is an int to isinstance
        raise RequestError(f"{name} must be an integer", param or name, code="invalid_type")
    if not low <= value <= high:
        raise RequestError(f"{name} must lie between {low} and {high}", param or name)


def _number(name: str, value: object, low: float, high: float, param: str = "") -> None:
    if type(value) not in (int, float):
        raise RequestError(f"{name} must be a number", param or name, code="invalid_type")
    assert isinstance(value, int | float)
    if not low <= value <= high:  # false for NaN, and exact for integers of any size
        raise RequestError(f"{name} must lie between {low:g} and {high:g}", param or name)

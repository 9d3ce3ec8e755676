"""Checks prompts and parameters and makes requests of them; needs the tokenizer, not the model.

Any thread may call it, and with `--engine-process` it is in another process than the engine.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from tokenizers import Tokenizer

from serve.engine.request import Request, RequestError, check_tokens, compile_grammar
from serve.engine.sampling_params import SamplingParams
from serve.grammar.compiler import GrammarCompiler
from serve.grammar.matcher import Grammar
from serve.text.encoder import TextEncoder


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What a started engine has: numbers and names that do not change."""

    name: str
    """Of the export."""
    dtype: str
    device: str
    cache: str
    """The KV cache in words."""
    ranks: str = ""
    """Several ranks in words."""
    tp: int
    max_length: int
    """Positions of the model."""
    longest: int
    """Tokens of prompt and output together that a request may have."""
    capacity: int
    """Tokens of the KV cache."""
    page_size: int
    vocab_size: int
    n_sampled: int
    """Tokens that may be sampled."""
    end_tokens: frozenset[int]
    max_running: int
    max_waiting: int
    routed_experts: bool
    """Whether experts of tokens are stored."""
    moe_layers: tuple[int, ...]
    """Indices of the layers with experts."""
    n_experts: int
    top_k: int
    model_type: str | None
    architectures: tuple[str, ...]


class InputProcessor:
    """Makes requests for one engine."""

    def __init__(self, info: EngineInfo, tokenizer: Tokenizer | None) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self._text_encoder: TextEncoder | None = None
        self.grammars: GrammarCompiler | None = None
        if tokenizer is not None:
            self._text_encoder = TextEncoder(tokenizer, info.longest)
            self.grammars = GrammarCompiler(tokenizer, info.end_tokens, info.n_sampled)

    @property
    def text_encoder(self) -> TextEncoder:
        """Raises RequestError if the export has no tokenizer."""
        if self._text_encoder is None:
            raise RequestError("this model has no tokenizer; send token ids", "prompt")
        return self._text_encoder

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Tokens of a text prompt, with the begin token if the tokenizer adds one. Text of special
        tokens is text like any other."""
        return self.text_encoder.encode(text, add_special_tokens)

    def make_requests(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        priority: int = 0,
        group: object | None = None,
    ) -> list[Request]:
        """A request for each of `params.n` choices. group: see `Request.group`; by default these
        are one. Raises RequestError if it can never be served.

        Grammars are compiled meanwhile: call `start_grammars` before the requests are submitted."""
        self._check(prompt, params)
        tokens, compiling = list(prompt), compile_grammar(self.grammars, params)
        group = object() if group is None else group
        return [
            self.make_request(tokens, params.choice(index), priority, group, compiling)
            for index in range(params.n)
        ]

    def make_request(
        self,
        tokens: list[int],
        params: SamplingParams,
        priority: int,
        group: object,
        compiling: Future[Grammar] | None = None,
    ) -> Request:
        """One request, with a checked prompt and parameters."""
        encoder, skip = self._text_encoder, params.skip_special_tokens
        shown = params.shown_special_tokens
        text = None if encoder is None else encoder.stream(params.stop, tokens, skip, shown)
        return Request(tokens, params, text, priority, group, compiling)

    def close(self) -> None:
        """End the processes of grammars."""
        if self.grammars is not None:
            self.grammars.close()

    def _check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        info = self.info
        check_tokens(prompt, params, info.longest, info.capacity, info.vocab_size, info.n_sampled)
        if params.return_routed_experts and not info.routed_experts:
            raise RequestError(
                "the engine was not started with routed_experts", "return_routed_experts"
            )
        if self.tokenizer is None and params.stop:
            raise RequestError("this model has no tokenizer; stop strings need one", "stop")

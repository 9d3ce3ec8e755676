"""The OpenAI completions format: parses request bodies and writes choice objects.

Everything is checked before memory is allocated for it, and every limit is a constant here or a
range in `serve.engine.request`. Unknown fields are ignored, since routers add their own; fields
that request an unsupported feature are an error unless they have their neutral value.

A choice is written piece by piece. A stream sends the pieces; an answer in one body concatenates
the same pieces, so both are always equal.
https://platform.openai.com/docs/api-reference/completions
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from tokenizers import Tokenizer

from serve.engine.request import Output, Request, RequestError, SamplingParams, TokenLogprob

MAX_SEQUENCES = 128
"""Maximum of prompts times `n` in one call."""

_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "suffix": ("",),
    "best_of": (1,),
    "response_format": ({"type": "text"},),
    "regex": (),
    "json_schema": (),
    "ebnf": (),
}
"""Fields that would change the answer, with the values (in addition to null) that do not."""

_PARAMS = (
    "max_tokens",
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "ignore_eos",
    "min_tokens",
    "logprobs",
    "echo",
)
"""Fields of a body that are fields of `SamplingParams`."""

Prompt = str | list[int]
Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Call:
    """A checked request body."""

    prompts: list[Prompt]
    params: SamplingParams
    stream: bool
    include_usage: bool
    token_ids: bool
    """Add the ids of the generated tokens to every choice (`return_token_ids`)."""


def parse_call(body: bytes, model_name: str) -> Call:
    """Check the body of `POST /v1/completions`. Raises RequestError: 400, or 404 for another
    model."""
    fields = _parse_json(body)
    model = fields.get("model")
    if model is not None and model != model_name:
        raise RequestError(
            f"there is no such model here; this server has {model_name}",
            "model",
            404,
            "model_not_found",
        )
    for name, neutral in _UNSUPPORTED.items():
        if fields.get(name) is not None and fields[name] not in neutral:
            raise RequestError(f"{name} is not supported", name, code="unsupported_parameter")
    prompts = _parse_prompts(fields.get("prompt"))
    params = _parse_params(fields)
    if params.n > MAX_SEQUENCES // len(prompts):
        raise RequestError(f"n x prompts must be at most {MAX_SEQUENCES}", "n")
    options = _get(fields, "stream_options", {})
    if not isinstance(options, dict):
        raise RequestError(
            "stream_options must be an object", "stream_options", code="invalid_type"
        )
    return Call(
        prompts=prompts,
        params=params,
        stream=_flag(fields, "stream"),
        include_usage=_flag(options, "include_usage"),
        token_ids=_flag(fields, "return_token_ids"),
    )


def _parse_json(body: bytes) -> Json:
    try:
        fields = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # ValueError: also bad UTF-8, huge integers, NaN
        raise RequestError("the body is not valid JSON", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise RequestError("the body must be a JSON object", code="invalid_type")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _get(fields: Json, name: str, default: Any) -> Any:
    """A field; null means its default."""
    value = fields.get(name)
    return default if value is None else value


def _flag(fields: Json, name: str) -> bool:
    value = _get(fields, name, False)
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false", name, code="invalid_type")
    return value


def _parse_params(fields: Json) -> SamplingParams:
    """Copy fields of the same name; `SamplingParams` checks them."""
    given = {name: fields[name] for name in _PARAMS if fields.get(name) is not None}
    stop = _get(fields, "stop", [])
    if isinstance(stop, str):
        stop = [stop]
    if not isinstance(stop, list):
        raise RequestError("stop must be a string or strings", "stop", code="invalid_type")
    ends = _get(fields, "stop_token_ids", [])
    if not isinstance(ends, list):
        raise RequestError("stop_token_ids must be a list", "stop_token_ids", code="invalid_type")
    return SamplingParams(
        **given, stop=tuple(stop), stop_token_ids=tuple(ends), logit_bias=_parse_bias(fields)
    )


def _parse_bias(fields: Json) -> dict[int, float]:
    """JSON has token ids as strings."""
    biases = _get(fields, "logit_bias", {})
    if not isinstance(biases, dict) or not all(key.isdecimal() for key in biases):
        raise RequestError(
            "logit_bias must be an object of token ids", "logit_bias", code="invalid_type"
        )
    return {int(key): value for key, value in biases.items()}


def _parse_prompts(value: object) -> list[Prompt]:
    """A text, texts, token ids, or lists of token ids; ids are range-checked by the engine."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return _at_most(value)
        if _are_ids(value):
            return [value]
        if all(isinstance(item, list) and item and _are_ids(item) for item in value):
            return _at_most(value)
    raise RequestError(
        "prompt must be a text, a list of texts, a list of token ids, or a list of such lists",
        "prompt",
        code="invalid_type",
    )


def _are_ids(items: list[object]) -> bool:
    return all(type(item) is int for item in items)


def _at_most(prompts: list[Prompt]) -> list[Prompt]:
    if len(prompts) > MAX_SEQUENCES:
        raise RequestError(f"at most {MAX_SEQUENCES} prompts fit in one call", "prompt")
    return prompts


class ChoiceWriter:
    """Converts the outputs of one request to the pieces of its choice object."""

    def __init__(
        self, index: int, request: Request, prompt: Prompt, call: Call, tokenizer: Tokenizer | None
    ) -> None:
        self.index = index
        self.request = request
        self.prompt = prompt
        self.with_ids = call.token_ids or tokenizer is None
        self.tokenizer = tokenizer
        self.started = False
        self.offset = 0

    def piece(self, output: Output) -> Json:
        """The part of the choice that `output` adds; the first one includes the echoed prompt."""
        text, scores = output.text, list(output.logprobs)
        logprobs = None
        if self.request.params.logprobs is not None:
            logprobs = _empty_logprobs()
        if self.request.params.echo and not self.started:
            text = self._prompt_text() + text
            if logprobs is not None:
                self._write(logprobs, self.request.prompt[0], None)
                scores = self.request.prompt_logprobs + scores
        self.started = True
        if logprobs is not None:
            for one in scores:
                self._write(logprobs, one.token, one)
        piece: Json = {
            "index": self.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": output.finish_reason,
        }
        if self.with_ids:
            piece["token_ids"] = output.tokens
        return piece

    def _prompt_text(self) -> str:
        if isinstance(self.prompt, str):
            return self.prompt
        return "" if self.tokenizer is None else self.tokenizer.decode(self.prompt)

    def _write(self, logprobs: Json, token: int, one: TokenLogprob | None) -> None:
        """Append a token. None: the first one of the prompt, which has no prediction."""
        logprobs["tokens"].append(self._name(token))
        logprobs["token_logprobs"].append(None if one is None else one.logprob)
        top: dict[str, float] = {}
        for candidate, logprob in [] if one is None else one.top:
            # two partial characters have the same text
            top.setdefault(self._name(candidate), logprob)
        logprobs["top_logprobs"].append(None if one is None else top)
        logprobs["text_offset"].append(self.offset)
        if self.tokenizer is not None:
            self.offset += len(self.tokenizer.decode([token]))

    def _name(self, token: int) -> str:
        if self.tokenizer is None:
            return f"token_id:{token}"
        name: str = self.tokenizer.decode([token], skip_special_tokens=False)
        return name


def _empty_logprobs() -> Json:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def join_pieces(pieces: Sequence[Json]) -> Json:
    """The whole choice."""
    whole = dict(pieces[-1])
    whole["text"] = "".join(piece["text"] for piece in pieces)
    if "token_ids" in whole:
        whole["token_ids"] = [token for piece in pieces for token in piece["token_ids"]]
    if whole["logprobs"] is not None:
        whole["logprobs"] = {
            key: [value for piece in pieces for value in piece["logprobs"][key]]
            for key in whole["logprobs"]
        }
    return whole


def usage(call: Call, requests: Sequence[Request]) -> Json:
    """Token counts; a prompt is counted once for any number of choices."""
    prompt = sum(len(request.prompt) for request in requests[:: call.params.n])
    completion = sum(request.n_output for request in requests)
    cached = sum(request.num_cached or 0 for request in requests[:: call.params.n])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def error_body(error: RequestError) -> Json:
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {
        "error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}
    }

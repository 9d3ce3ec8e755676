"""The OpenAI completions format.

Everything is checked before memory is allocated for it, and every limit is a constant here or a
range in `serve.engine.sampling_params`.
https://platform.openai.com/docs/api-reference/completions
"""

import time
import uuid
from collections.abc import Sequence

from serve.api.answer import Writer
from serve.api.errors import Json
from serve.api.fields import (
    MAX_SEQUENCES,
    READ,
    STRUCTURED,
    TOOLS,
    UNSUPPORTED,
    check_model,
    check_names,
    flag,
    get,
    priority,
    sampling_params,
    text,
)
from serve.engine.input_processor import InputProcessor
from serve.engine.request import FinishReason, Output, Request, RequestError, TokenLogprob
from serve.text.token_names import TokenNames

Prompt = str | list[int]

_USED = (
    *READ,
    *("prompt", "logprobs", "echo", "add_special_tokens", "return_token_ids"),
    *("model", "stream", "stream_options", "priority", "rid"),
)


def parse_prompts(value: object, name: str) -> list[Prompt]:
    """A text, texts, token ids, or lists of token ids; ids are range-checked by the engine."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return _at_most(value, name)
        if _are_ids(value):
            return [value]
        if all(isinstance(item, list) and item and _are_ids(item) for item in value):
            return _at_most(value, name)
    raise RequestError(
        f"{name} must be a text, a list of texts, a list of token ids, or a list of such lists",
        name,
        code="invalid_type",
    )


def _are_ids(items: list[object]) -> bool:
    return all(type(item) is int for item in items)


def _at_most(prompts: list[Prompt], name: str) -> list[Prompt]:
    if len(prompts) > MAX_SEQUENCES:
        raise RequestError(f"at most {MAX_SEQUENCES} prompts fit in one call", name)
    return prompts


def include_usage(fields: Json) -> bool:
    options = get(fields, "stream_options", {})
    if not isinstance(options, dict):
        raise RequestError(
            "stream_options must be an object", "stream_options", code="invalid_type"
        )
    return flag(options, "include_usage")


def finish_reason(reason: FinishReason | None) -> str | None:
    return "abort" if reason == "cancelled" else reason


def usage(requests: Sequence[Request], n: int) -> Json:
    """Token counts; a prompt is counted once for any number of choices."""
    prompt = sum(len(request.prompt) for request in requests[::n])
    completion = sum(request.n_output for request in requests)
    cached = sum(request.num_cached or 0 for request in requests[::n])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class CompletionsWriter(Writer):
    """A checked body of `POST /v1/completions`, and its answer. Raises RequestError."""

    def __init__(self, fields: Json, inputs: InputProcessor, model_name: str) -> None:
        check_model(fields, model_name)
        check_names(fields, _USED, STRUCTURED | TOOLS | UNSUPPORTED)
        prompts = parse_prompts(fields.get("prompt"), "prompt")
        scores = fields.get("logprobs")
        if scores is False:  # as routers write it
            scores = None
        more = {"echo": get(fields, "echo", False), "logprobs": scores}
        self.params = sampling_params(fields, **more)
        if self.params.n > MAX_SEQUENCES // len(prompts):
            raise RequestError(f"n x prompts must be at most {MAX_SEQUENCES}", "n")
        self.stream = flag(fields, "stream")
        self.include_usage = include_usage(fields)
        self.with_ids = flag(fields, "return_token_ids") or inputs.tokenizer is None
        self.names = [text(fields, "rid") or uuid.uuid4().hex]
        special, rank = flag(fields, "add_special_tokens", True), priority(fields)
        self.choices: dict[Request, _Choice] = {}
        for prompt in prompts:
            tokens = inputs.encode(prompt, special) if isinstance(prompt, str) else prompt
            for request in inputs.make_requests(tokens, self.params, rank, self):
                index = len(self.choices)
                self.choices[request] = _Choice(index, request, prompt, inputs, self.with_ids)
        self.requests = list(self.choices)
        self.head: Json = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model_name,
        }

    def add(self, output: Output) -> list[Json]:
        piece = self.choices[output.request].add(output)
        if not (
            piece["text"] or piece["finish_reason"] or "token_ids" in piece or piece["logprobs"]
        ):
            return []
        tail = {"usage": None} if self.include_usage else {}
        return [self.head | {"choices": [piece]} | tail]

    def end(self) -> list[Json]:
        if not self.include_usage:
            return []
        return [self.head | {"choices": [], "usage": usage(self.requests, self.params.n)}]

    def whole(self) -> Json:
        choices = [choice.join() for choice in self.choices.values()]
        return self.head | {"choices": choices, "usage": usage(self.requests, self.params.n)}


class _Choice:
    """Converts the outputs of one request to the pieces of its choice object."""

    def __init__(
        self, index: int, request: Request, prompt: Prompt, inputs: InputProcessor, with_ids: bool
    ) -> None:
        self.index = index
        self.request = request
        self.prompt = prompt
        self.with_ids = with_ids
        self.inputs = inputs
        self.names: TokenNames | None = None
        self.pieces: list[Json] = []
        params, tokenizer = request.params, inputs.tokenizer
        if params.logprobs is not None and tokenizer is not None:
            self.names = inputs.text_encoder.names(
                () if params.echo else request.prompt, params.skip_special_tokens
            )

    def add(self, output: Output) -> Json:
        """The part of the choice that `output` adds; the first one includes the echoed prompt."""
        params = self.request.params
        added, scores = output.text, list(output.logprobs)
        logprobs: Json | None = None
        if params.logprobs is not None:
            logprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        if params.echo and not self.pieces:
            added = self._prompt_text() + added
            if logprobs is not None:
                self._write(logprobs, self.request.prompt[0], None)
                scores = self.request.prompt_logprobs + scores
        if logprobs is not None:
            for one in scores:
                self._write(logprobs, one.token, one)
        piece: Json = {
            "index": self.index,
            "text": added,
            "logprobs": logprobs,
            "finish_reason": finish_reason(output.finish_reason),
        }
        if self.with_ids:
            piece["token_ids"] = output.tokens
        self.pieces.append(piece)
        return piece

    def _prompt_text(self) -> str:
        """The prompt as it was sent, or as its tokens read if places in it are reported."""
        if isinstance(self.prompt, str) and self.names is None:
            return self.prompt
        if self.inputs.tokenizer is None:
            return ""
        encoder = self.inputs.text_encoder
        return encoder.decode(self.request.prompt, self.request.params.skip_special_tokens)

    def _write(self, logprobs: Json, token: int, one: TokenLogprob | None) -> None:
        """Append a token. None: the first one of the prompt, which has no prediction."""
        top = [] if one is None else one.top
        logprob = None if one is None else one.logprob
        if self.names is None:
            names = {other: f"token_id:{other}" for other in (token, *(t for t, _ in top))}
            offset = 0
        else:
            names = self.names.name((token, *(other for other, _ in top)))
            offset = self.names.add(token)
        logprobs["tokens"].append(names[token])
        logprobs["token_logprobs"].append(logprob)
        values = {names[other]: value for other, value in top} | {names[token]: logprob}
        logprobs["top_logprobs"].append(None if one is None else values)
        logprobs["text_offset"].append(offset)

    def join(self) -> Json:
        """The whole choice."""
        whole = dict(self.pieces[-1])
        whole["text"] = "".join(piece["text"] for piece in self.pieces)
        if self.with_ids:
            whole["token_ids"] = [token for piece in self.pieces for token in piece["token_ids"]]
        if whole["logprobs"] is not None:
            whole["logprobs"] = {
                key: [value for piece in self.pieces for value in piece["logprobs"][key]]
                for key in whole["logprobs"]
            }
        return whole

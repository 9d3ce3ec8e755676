"""SGLang's native `POST /generate`.

A body has one prompt or a list of prompts; a list, or `n` above 1, gets a list of results. A
stream's texts and ids are cumulative. https://docs.sglang.ai/basic_usage/native_api.html
"""

import base64
import time
import uuid
from typing import Any

import numpy as np

from serve.api.answer import Writer
from serve.api.errors import Json
from serve.api.fields import (
    MAX_SEQUENCES,
    READ,
    STRUCTURED,
    TOOLS,
    UNSUPPORTED,
    check_names,
    flag,
    integer,
    priority,
    sampling_params,
    text,
)
from serve.api.openai_completions import Prompt, parse_prompts
from serve.api.structured import GRAMMARS
from serve.engine.input_processor import InputProcessor
from serve.engine.request import Output, Request, RequestError, SamplingParams, TokenLogprob
from serve.engine.sampling_params import MAX_LOGPROBS

_USED = (
    *("text", "input_ids", "sampling_params", "stream", "rid", "priority", "model"),
    *("return_logprob", "logprob_start_len", "top_logprobs_num", "return_text_in_logprobs"),
    "return_routed_experts",
)
_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "sampling_seed": "seed"}
"""SGLang's names of sampling parameters, and ours."""
_DEFAULT_MAX_TOKENS = 128
_LARGE = 1 << 15
"""Numbers in an event, about, above which the next one waits for some more tokens."""
_SCORE = 8
"""Times the size of a token, that of its log-probability."""
_ELSEWHERE: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(GRAMMARS, ({"type": "text"},)), "echo": (False,), "logprobs": (False, 0)
}  # fmt: skip
"""Fields that belong into `sampling_params` or to other routes, as in UNSUPPORTED."""


def _params(value: object, more: Json) -> SamplingParams:
    fields = {} if value is None else value
    if not isinstance(fields, dict):
        raise RequestError(
            "sampling_params must be an object", "sampling_params", code="invalid_type"
        )
    known = {*READ}
    fields = {_NAMES.get(str(name), str(name)): one for name, one in fields.items()}
    refused = STRUCTURED | TOOLS | UNSUPPORTED
    check_names(fields, known, refused)
    for name in fields.keys() - known - refused.keys():
        raise RequestError(f"sampling_params has no {name:.80}", "sampling_params")
    return sampling_params({"max_tokens": _DEFAULT_MAX_TOKENS} | fields, **more)


def _prompts(fields: Json) -> tuple[list[Prompt], bool]:
    """The prompts, and whether they were a list."""
    given = [name for name in ("text", "input_ids") if fields.get(name) is not None]
    if len(given) != 1:
        raise RequestError("one of text and input_ids is required", "text", code="invalid_type")
    value = fields[given[0]]
    prompts = parse_prompts(value, given[0])
    if isinstance(prompts[0], str) != (given[0] == "text"):
        raise RequestError(f"{given[0]} has the wrong type", given[0], code="invalid_type")
    return prompts, isinstance(value, list) and isinstance(value[0], str | list)


def _names(fields: Json, n: int) -> list[str]:
    rid = fields.get("rid")
    if not isinstance(rid, list):
        return [text(fields, "rid") or uuid.uuid4().hex] * n
    names = [text({"rid": one}, "rid") or uuid.uuid4().hex for one in rid[: n + 1]]
    if len(names) != n or len(set(names)) != n:
        raise RequestError("rid must have one distinct name per prompt", "rid")
    return names


class GenerateWriter(Writer):
    """A checked body, and its answer. Raises RequestError."""

    def __init__(self, fields: Json, inputs: InputProcessor) -> None:
        check_names(fields, _USED, _ELSEWHERE | STRUCTURED | TOOLS | UNSUPPORTED)
        prompts, self.many = _prompts(fields)
        self.stream = flag(fields, "stream")
        self.scored = flag(fields, "return_logprob")
        self.start_len = integer(fields, "logprob_start_len", -1, 1 << 20)
        top = integer(fields, "top_logprobs_num", 0, MAX_LOGPROBS) or 0
        self.with_text = flag(fields, "return_text_in_logprobs")
        self.top = top
        more: Json = {"return_routed_experts": flag(fields, "return_routed_experts")}
        if self.scored:
            more["logprobs"] = top
            if self.start_len is not None and self.start_len >= 0:
                more["prompt_logprobs"] = top
        params = fields.get("sampling_params")
        each = params if isinstance(params, list) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise RequestError("one sampling_params per prompt is required", "sampling_params")
        checked = [_params(one, more) for one in each]
        if sum(one.n for one in checked) > MAX_SEQUENCES:
            raise RequestError(f"n x prompts must be at most {MAX_SEQUENCES}", "sampling_params")
        self.names = _names(fields, len(prompts))
        rank = priority(fields)
        self.results: dict[Request, _Result] = {}
        for prompt, one, name in zip(prompts, checked, self.names, strict=True):
            tokens = inputs.encode(prompt) if isinstance(prompt, str) else prompt
            for request in inputs.make_requests(tokens, one, rank, self):
                self.results[request] = _Result(len(self.results), request, name, inputs, self)
        self.requests = list(self.results)
        self.many = self.many or len(self.requests) > 1

    def add(self, output: Output) -> list[Json]:
        result = self.results[output.request]
        result.add(output)
        if not self.stream or not result.is_due():
            return []
        return [result.write() | ({"index": result.index} if self.many else {})]

    def end(self) -> list[Json]:
        return []

    def whole(self) -> Json | list[Json]:
        results = [result.write() for result in self.results.values()]
        return results if self.many else results[0]


class _Result:
    """The state of one request."""

    def __init__(
        self, index: int, request: Request, name: str, inputs: InputProcessor, call: GenerateWriter
    ) -> None:
        self.index = index
        self.request = request
        self.name = name
        self.inputs = inputs
        self.call = call
        self.text = ""
        self.tokens: list[int] = []
        self.logprobs: list[list[Any]] = []
        self.top_logprobs: list[list[list[Any]]] = []
        self.prompt_scores: Json | None = None
        self.n_written = 0
        """Tokens of the last event."""
        self.begun = time.monotonic()
        self.reason: Json | None = None

    def add(self, output: Output) -> None:
        self.text += output.text
        self.tokens += output.tokens
        self.logprobs += [self._triple(one) for one in output.logprobs]
        if self.call.top:
            self.top_logprobs += [self._top(one) for one in output.logprobs]
        if self.call.scored and self.prompt_scores is None:
            self.prompt_scores = self._score_prompt()
        if output.finish_reason == "length":
            self.reason = {"type": "length", "length": len(self.tokens)}
        elif output.finish_reason == "cancelled":
            self.reason = {"type": "abort", "message": "the request was aborted"}
        elif output.finish_reason is not None:
            self.reason = {"type": "stop", "matched": self._matched()}

    def _matched(self) -> Any:
        """The end token, or the stop string."""
        if self.request.matched is not None:
            return self.request.matched
        last, more = self.tokens[-1], self.request.params.stop_token_ids
        return last if last in self.inputs.info.end_tokens.union(more) else None

    def is_due(self) -> bool:
        """Whether an event is worth its time: each repeats everything, so those of a long output
        have more and more new tokens."""
        size = len(self.tokens)
        if self.call.scored:
            size += _SCORE * (1 + self.call.top) * (size + len(self.request.prompt_logprobs))
        n_new = len(self.tokens) - self.n_written
        return self.reason is not None or size < _LARGE or 16 * n_new >= len(self.tokens)

    def write(self) -> Json:
        self.n_written = len(self.tokens)
        request = self.request
        meta: Json = {
            "id": self.name,
            "finish_reason": self.reason,
            "prompt_tokens": len(request.prompt),
            "completion_tokens": len(self.tokens),
            "cached_tokens": request.num_cached or 0,
        }
        if self.reason is not None:
            meta["e2e_latency"] = time.monotonic() - self.begun
        if self.call.scored:
            meta |= self._scores()
        if request.routed_experts is not None:
            ids = np.ascontiguousarray(request.routed_experts, dtype="<i4")
            meta["routed_experts"] = base64.b64encode(ids.tobytes()).decode()
            meta["routed_experts_shape"] = list(ids.shape)
        return {"text": self.text, "output_ids": list(self.tokens), "meta_info": meta}

    def _scores(self) -> Json:
        """Lists of [log-probability, token, text]."""
        found: Json = {"output_token_logprobs": list(self.logprobs), **(self.prompt_scores or {})}
        if self.call.top:
            found["output_top_logprobs"] = list(self.top_logprobs)
        return found

    def _score_prompt(self) -> Json:
        start = self.call.start_len
        if start is None or start < 0:
            return {}
        prompt = [None, *self.request.prompt_logprobs][start:]
        first = [[None, self.request.prompt[0], self._text(self.request.prompt[0])]]
        scored = [self._triple(one) for one in prompt if one is not None]
        found: Json = {"input_token_logprobs": (first if start == 0 else []) + scored}
        if self.call.top:
            found["input_top_logprobs"] = [one and self._top(one) for one in prompt]
        return found

    def _triple(self, one: TokenLogprob) -> list[Any]:
        return [one.logprob, one.token, self._text(one.token)]

    def _top(self, one: TokenLogprob) -> list[list[Any]]:
        return [[value, token, self._text(token)] for token, value in one.top]

    def _text(self, token: int) -> str | None:
        tokenizer = self.inputs.tokenizer
        if not self.call.with_text or tokenizer is None:
            return None
        found: str = tokenizer.decode([token], skip_special_tokens=False)
        return found

"""The OpenAI chat completions format.

https://platform.openai.com/docs/api-reference/chat
"""

import json
import time
import uuid

from serve.api.answer import Writer
from serve.api.errors import Json
from serve.api.fields import (
    MAX_SEQUENCES,
    READ,
    STRUCTURED,
    UNSUPPORTED,
    check_model,
    check_names,
    flag,
    get,
    integer,
    priority,
    sampling_params,
    text,
)
from serve.api.openai_completions import finish_reason, include_usage, usage
from serve.api.structured import GRAMMARS, grammar_fields
from serve.api.tools import MessageParser, Tools, parse_tools
from serve.engine.input_processor import InputProcessor
from serve.engine.request import Output, Request, RequestError, TokenLogprob
from serve.engine.sampling_params import MAX_LOGPROBS, MAX_TOKENS
from serve.frontend.chat import ChatTemplate, Message
from serve.text.token_names import TokenNames
from serve.tool_calls.choice import ChatFormat
from serve.tool_calls.forms import THINK, HarmonyForm
from serve.tool_calls.reasoning import ReasoningParser
from serve.tool_calls.structure import Structure

ROLES = ("system", "developer", "user", "assistant", "tool")
_USED = (
    *READ,
    *("messages", "logprobs", "top_logprobs", "max_completion_tokens", "chat_template_kwargs"),
    *("model", "stream", "stream_options", "priority", "rid", "return_token_ids", "echo"),
    *("tools", "tool_choice", "parallel_tool_calls", "separate_reasoning"),
)
_RESERVED = ("messages", "add_generation_prompt", "tools", "documents")


def parse_messages(value: object, form: ChatFormat) -> list[Message]:
    """Messages for a template: content is text; parts of it are joined. Raises RequestError."""
    if not isinstance(value, list) or not value:
        raise RequestError("messages must be a list of objects", "messages", code="invalid_type")
    return [_parse_message(one, f"messages[{i}]", form) for i, one in enumerate(value)]


def _parse_message(value: object, place: str, form: ChatFormat) -> Message:
    if not isinstance(value, dict):
        raise RequestError(f"{place} must be an object", "messages", code="invalid_type")
    role = value.get("role")
    if role not in ROLES:
        raise RequestError(f"{place}.role must be one of {', '.join(ROLES)}", "messages")
    message: Message = {"role": role, "content": _parse_content(value.get("content"), place)}
    for name in ("name", "tool_call_id"):
        if value.get(name) is not None:
            if not isinstance(value[name], str):
                raise RequestError(f"{place}.{name} must be a string", "messages")
            message[name] = value[name]
    for name in ("reasoning_content", "reasoning"):
        if isinstance(value.get(name), str):  # templates have two names for it
            message |= {"reasoning_content": value[name], "thinking": value[name]}
    if value.get("tool_calls"):
        calls = _parse_tool_calls(value["tool_calls"], place)
        if form.arguments_as_text:
            for one in calls:
                function = one["function"]
                function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        message["tool_calls"] = calls
        if not message["content"] and not form.empty_content:
            message["content"] = None
    elif value.get("content") is None:
        raise RequestError(f"{place}.content is missing", "messages", code="invalid_type")
    return message


def _parse_content(content: object, place: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(
            f"{place}.content must be a text or a list of parts", "messages", code="invalid_type"
        )
    for part in content:
        known = isinstance(part, dict) and part.get("type") == "text"
        if not known or not isinstance(part.get("text"), str):
            raise RequestError(
                f"{place}.content has a part that is not text; only text is supported",
                "messages",
                code="unsupported_content",
            )
    return "".join(part["text"] for part in content)


def _parse_tool_calls(calls: object, place: str) -> list[Json]:
    """Earlier calls of tools, as templates read them: with their arguments as an object."""
    found = []
    wrong = RequestError(f"{place}.tool_calls must be a list of function calls", "messages")
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(function, dict):
            raise wrong
        if not isinstance(function.get("name"), str):
            raise wrong
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                raise wrong from None
        name = call.get("id") or ""
        if not isinstance(name, str):
            raise wrong
        called = {"name": function["name"], "arguments": arguments}
        found.append({"id": name, "type": "function", "function": called})
    return found


class ChatWriter(Writer):
    """A checked body of `POST /v1/chat/completions`, and its answer. Raises RequestError."""

    def __init__(
        self,
        fields: Json,
        inputs: InputProcessor,
        template: ChatTemplate | None,
        chat_format: ChatFormat,
        model_name: str,
    ) -> None:
        check_model(fields, model_name)
        check_names(fields, _USED, STRUCTURED | UNSUPPORTED)
        if flag(fields, "echo"):
            raise RequestError("echo is not supported", "echo", code="unsupported_parameter")
        if template is None or inputs.tokenizer is None:
            raise RequestError(
                "this model has no chat template; use /v1/completions", code="no_chat_template"
            )
        variables = get(fields, "chat_template_kwargs", {})
        if not isinstance(variables, dict) or not variables.keys().isdisjoint(_RESERVED):
            raise RequestError(
                "chat_template_kwargs must be an object of other variables",
                "chat_template_kwargs",
                code="invalid_type",
            )
        definitions, tools = parse_tools(fields)
        if definitions:
            variables = variables | {"tools": definitions}
        encoder = inputs.text_encoder
        rendered = template.render(
            parse_messages(fields.get("messages"), chat_format), encoder.mark_text, variables
        )
        tokens = encoder.encode_rendered(rendered, "messages")
        answer = _AnswerFormat(fields, inputs, chat_format, tools, rendered)
        more: Json = {
            "logprobs": _logprobs(fields), "max_tokens": _max_tokens(fields, inputs, len(tokens))
        } | answer.params  # fmt: skip
        self.params = sampling_params(fields, **more)
        if self.params.n > MAX_SEQUENCES:
            raise RequestError(f"n must be at most {MAX_SEQUENCES}", "n")
        self.stream = flag(fields, "stream")
        self.include_usage = include_usage(fields)
        self.names = [text(fields, "rid") or uuid.uuid4().hex]
        self.requests = inputs.make_requests(tokens, self.params, priority(fields), self)
        with_ids = flag(fields, "return_token_ids")
        self.choices = {
            request: _Choice(index, request, inputs, with_ids, answer.parser())
            for index, request in enumerate(self.requests)
        }
        self.head: Json = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model_name,
        }

    def add(self, output: Output) -> list[Json]:
        choice = self.choices[output.request]
        events = [] if choice.begun else [self._chunk(choice.begin())]
        piece = choice.add(output)
        if piece["delta"] or piece["finish_reason"] or piece["logprobs"] or piece.get("token_ids"):
            events.append(self._chunk(piece))
        return events

    def end(self) -> list[Json]:
        if not self.include_usage:
            return []
        counts = {"choices": [], "usage": usage(self.requests, self.params.n)}
        return [self.head | {"object": "chat.completion.chunk"} | counts]

    def whole(self) -> Json:
        choices = [choice.join() for choice in self.choices.values()]
        counts = usage(self.requests, self.params.n)
        return self.head | {"object": "chat.completion", "choices": choices, "usage": counts}

    def _chunk(self, choice: Json) -> Json:
        tail: Json = {"choices": [choice]} | ({"usage": None} if self.include_usage else {})
        return self.head | {"object": "chat.completion.chunk"} | tail


def _logprobs(fields: Json) -> int | None:
    top = integer(fields, "top_logprobs", 0, MAX_LOGPROBS)
    if flag(fields, "logprobs"):
        return top or 0
    if top:
        raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
    return None


def _max_tokens(fields: Json, inputs: InputProcessor, n_prompt: int) -> int:
    """By default what the context leaves."""
    for name in ("max_completion_tokens", "max_tokens"):
        found = integer(fields, name, 0, MAX_TOKENS)
        if found is not None:
            return found
    return max(0 if n_prompt > inputs.info.longest else 1, inputs.info.longest - n_prompt)


class _AnswerFormat:
    """How the text of an answer is restricted and divided. params: fields of `SamplingParams`."""

    def __init__(
        self,
        fields: Json,
        inputs: InputProcessor,
        chat_format: ChatFormat,
        tools: Tools | None,
        rendered: str,
    ) -> None:
        self.form = chat_format.form
        self.tools = tools
        self.thinks = chat_format.thinks and flag(fields, "separate_reasoning", True)
        self.is_open = rendered.rstrip().endswith(THINK)
        self.params: Json = {}
        special = inputs.text_encoder.special_tokens
        structure = Structure(self.form, special, inputs.info.end_tokens, self.thinks)
        given = next((name for name in GRAMMARS if fields.get(name) is not None), None)
        if tools is not None:
            if given is not None and fields[given] != {"type": "text"}:
                raise RequestError(f"{given} and tools exclude each other", given)
            self.params["structural_tag"] = structure.tag(
                tools.callable, tools.free_text, tools.one_only, self.is_open
            )
        elif given is not None:
            self.params = structure.around(grammar_fields(fields), self.is_open)
        if self.thinks or tools is not None or isinstance(self.form, HarmonyForm):
            self.params["shown_special_tokens"] = structure.shown

    def parser(self) -> MessageParser:
        reasoning = ReasoningParser(self.is_open) if self.thinks else None
        if self.tools is None:
            return MessageParser(self.form, (), False, reasoning)
        return MessageParser(self.form, self.tools.callable, self.tools.named, reasoning)


class _Choice:
    """Converts the outputs of one request to deltas and to its choice object."""

    def __init__(
        self,
        index: int,
        request: Request,
        inputs: InputProcessor,
        with_ids: bool,
        parser: MessageParser,
    ) -> None:
        self.index = index
        self.request = request
        self.with_ids = with_ids
        self.begun = False
        self.parser = parser
        self.logprobs: list[Json] | None = None
        self.reason: str | None = None
        self.names: TokenNames | None = None
        if request.params.logprobs is not None:
            self.logprobs = []
            self.names = inputs.text_encoder.names(
                request.prompt, request.params.skip_special_tokens
            )

    def begin(self) -> Json:
        """The role. It is sent with the first token: clients take the time of the first event for
        that of the first token."""
        self.begun = True
        role: Json = {"role": "assistant", "content": ""}
        return {"index": self.index, "delta": role, "logprobs": None, "finish_reason": None}

    def add(self, output: Output) -> Json:
        self.reason = finish_reason(output.finish_reason)
        delta = self.parser.add(output.text, self.reason is not None)
        self.reason = self.parser.finish_reason(self.reason)
        logprobs = None
        if self.logprobs is not None:
            logprobs = [self._entry(one) for one in output.logprobs]
            self.logprobs += logprobs
        piece: Json = {
            "index": self.index,
            "delta": delta,
            "logprobs": {"content": logprobs, "refusal": None} if logprobs else None,
            "finish_reason": self.reason,
        }
        if self.with_ids:
            piece["token_ids"] = output.tokens
        return piece

    def _entry(self, one: TokenLogprob) -> Json:
        assert self.names is not None
        names = self.names.name((one.token, *(token for token, _ in one.top)))
        top = dict(one.top[: self.request.params.logprobs])
        if self.request.params.logprobs:
            top.setdefault(one.token, one.logprob)  # the sampled token is always among them
        self.names.add(one.token)
        own: Json = self._named(names[one.token], one.token, one.logprob)
        listed = [self._named(names[token], token, value) for token, value in top.items()]
        return own | {"top_logprobs": listed}

    def _named(self, name: str, token: int, logprob: float) -> Json:
        assert self.names is not None
        return {"token": name, "logprob": logprob, "bytes": self.names.bytes_of(token, name)}

    def join(self) -> Json:
        """The whole choice."""
        choice: Json = {
            "index": self.index,
            "message": self.parser.message(),
            "logprobs": None,
            "finish_reason": self.reason,
        }
        if self.logprobs is not None:
            choice["logprobs"] = {"content": self.logprobs, "refusal": None}
        if self.with_ids:
            choice["token_ids"] = self.request.output
        return choice

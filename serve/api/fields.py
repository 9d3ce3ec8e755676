"""Fields of request bodies.

Every field is in one of four groups: those that a route reads; unsupported ones that would change
the answer, which are an error unless their value has no effect; harmless ones, which are ignored;
and unknown ones, which are ignored too, because routers add their own, with one line in the log.
"""

import json
import logging
from collections.abc import Iterable
from typing import Any, NoReturn

from serve.api.errors import Json
from serve.api.structured import GRAMMARS, grammar_fields
from serve.engine.request import RequestError, SamplingParams

log = logging.getLogger("serve")

MAX_SEQUENCES = 128
"""Maximum of prompts times `n` in one call."""
MAX_PRIORITY = 1 << 31

STRUCTURED: dict[str, tuple[object, ...]] = {
    "guided_decoding_backend": ("auto", "xgrammar"),
    "guided_whitespace_pattern": (),
    "functions": ([],),
    "function_call": ("none", "auto"),
}
"""Fields of structured output that are not supported, with the values (in addition to null) that
have no effect."""
TOOLS: dict[str, tuple[object, ...]] = {"tools": ([],), "tool_choice": ("none", "auto")}
"""The same for routes without chats."""
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "suffix": ("",),
    "best_of": (1,),
    "use_beam_search": (False,),
    "beam_width": (1,),
    "num_beams": (1,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "typical_p": (1,),
    "tfs": (1,),
    "top_a": (0,),
    "top_n_sigma": (0, -1),
    "mirostat": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "dynatemp_range": (0,),
    "no_repeat_ngram_size": (0,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": ([],),
    "custom_logit_processor": (),
    "vllm_xargs": (),
    "grammar": ("",),
    "include_stop_str_in_output": (False,),
    "no_stop_trim": (False,),
    "stop_regex": ([], ""),
    "spaces_between_special_tokens": (True,),
    "detokenize": (True,),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "logprob_token_ids": ([],),
    "token_ids_logprob": ([],),
    "return_tokens_as_token_ids": (False,),
    "return_hidden_states": (False,),
    "prompt_embeds": (),
    "input_embeds": (),
    "image_data": ([],),
    "audio_data": ([],),
    "video_data": ([],),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"], []),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "thinking": (),
    "verbosity": ("medium",),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "chat_template": (),
    "documents": ([],),
    "lora_path": (),
    "session_params": ({},),
    "cache_salt": ("",),
    "extra_key": ("",),
    "custom_params": ({},),
}
"""Other fields that would change the answer, in the same form."""
HARMLESS = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention "
    "parallel_tool_calls request_id model rid priority stream stream_options log_metrics "
    "background no_logs return_bytes return_entropy return_text_in_logprobs "
    "stream_reasoning include_reasoning separate_reasoning data_parallel_rank bootstrap_host "
    "bootstrap_port bootstrap_room return_prompt_text_in_logprobs custom_labels "
    "return_cached_tokens_details "
    "incremental_streaming conversation_id timestamp".split()
)
"""Ignored where they are not read: they do not change the answer."""
_reported: set[str] = set()
_MOST_REPORTED = 200


def parse_json(body: bytes) -> Json:
    """The object in a body. Raises RequestError (400)."""
    try:
        fields = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # ValueError: also bad UTF-8, huge integers, NaN
        raise RequestError("the body is not valid JSON", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise RequestError("the body must be a JSON object", code="invalid_type")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def check_names(fields: Json, used: Iterable[str], refused: dict[str, tuple[object, ...]]) -> None:
    """Raise RequestError for a field of `refused` that has an effect; log unknown ones.

    used: fields that the route reads.
    """
    known = {*used}
    for name, value in fields.items():
        if name in known or value is None:
            continue
        if name in refused:
            if not any(value == one and type(value) in _like(one) for one in refused[name]):
                raise RequestError(f"{name} is not supported", name, code="unsupported_parameter")
        elif name not in HARMLESS and name not in _reported and len(_reported) < _MOST_REPORTED:
            _reported.add(name)
            log.warning("field %.80r of a request is unknown and ignored", name)


def _like(value: object) -> tuple[type, ...]:
    """Types of values that are equal to `value` in JSON: 1 and 1.0, but not true."""
    return (int, float) if type(value) is int else (type(value),)


def get(fields: Json, name: str, default: Any) -> Any:
    """A field; null means its default."""
    value = fields.get(name)
    return default if value is None else value


def flag(fields: Json, name: str, default: bool = False) -> bool:
    value = get(fields, name, default)
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false", name, code="invalid_type")
    return value


def integer(fields: Json, name: str, low: int, high: int) -> int | None:
    """None if it is absent."""
    value = fields.get(name)
    if value is None:
        return None
    if type(value) is not int:
        raise RequestError(f"{name} must be an integer", name, code="invalid_type")
    if not low <= value <= high:
        raise RequestError(f"{name} must lie between {low} and {high}", name)
    return value


def text(fields: Json, name: str, longest: int = 256) -> str | None:
    """None if it is absent."""
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise RequestError(f"{name} must be a string", name, code="invalid_type")
    if not 1 <= len(value) <= longest or not value.isprintable():
        raise RequestError(f"{name} must have 1 to {longest} printable characters", name)
    return value


def priority(fields: Json) -> int:
    return integer(fields, "priority", -MAX_PRIORITY, MAX_PRIORITY) or 0


SAMPLING = (
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
    "skip_special_tokens",
)
"""Fields of a body that are fields of `SamplingParams`, checked there."""
SAMPLING_LISTS = ("stop", "stop_token_ids", "logit_bias")
READ = (*SAMPLING, *SAMPLING_LISTS, *GRAMMARS)
"""Fields that `sampling_params` reads."""


def sampling_params(fields: Json, **more: Any) -> SamplingParams:
    """Those of a body. more: values for which the format has other names."""
    given = {name: fields[name] for name in SAMPLING if fields.get(name) is not None}
    stop = get(fields, "stop", [])
    if isinstance(stop, str):
        stop = [stop]
    if not isinstance(stop, list):
        raise RequestError("stop must be a string or strings", "stop", code="invalid_type")
    ends = get(fields, "stop_token_ids", [])
    if not isinstance(ends, list):
        raise RequestError("stop_token_ids must be a list", "stop_token_ids", code="invalid_type")
    lists = {"stop": tuple(stop), "stop_token_ids": tuple(ends), "logit_bias": _biases(fields)}
    return SamplingParams(**{**given, **lists, **grammar_fields(fields), **more})


def _biases(fields: Json) -> dict[int, float]:
    """JSON has token ids as strings."""
    biases = get(fields, "logit_bias", {})
    if not isinstance(biases, dict) or not all(
        key.isascii() and key.isdecimal() and len(key) < 12 for key in biases
    ):
        raise RequestError(
            "logit_bias must be an object of token ids", "logit_bias", code="invalid_type"
        )
    return {int(key): value for key, value in biases.items()}


def check_model(fields: Json, model_name: str) -> None:
    """Raise RequestError (404) for another model."""
    model = fields.get("model")
    if model is not None and model != model_name:
        raise RequestError(
            f"there is no such model here; this server has {model_name}",
            "model",
            404,
            "model_not_found",
        )

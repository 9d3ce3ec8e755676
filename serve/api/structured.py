"""Structured output in request bodies: the fields of OpenAI, SGLang and vLLM."""

from typing import Any

from serve.api.errors import Json
from serve.engine.sampling_params import RequestError

_NAMES = {
    "json_schema": "json_schema", "regex": "regex", "ebnf": "ebnf",
    "structural_tag": "structural_tag", "guided_json": "json_schema", "guided_regex": "regex",
    "guided_grammar": "ebnf", "guided_choice": "choices",
}  # fmt: skip
_STRUCTURED_OUTPUTS = {
    "json": "json_schema", "regex": "regex", "grammar": "ebnf", "choice": "choices",
    "structural_tag": "structural_tag",
}  # fmt: skip
_ANY_OBJECT = {"type": "object"}
GRAMMARS = (*_NAMES, "response_format", "structured_outputs")
"""Fields of a body that have a grammar."""

_Found = list[tuple[str, str, Any]]
"""Names of the fields of a body and of `SamplingParams`, and the value."""


def grammar_fields(fields: Json) -> Json:
    """The fields of `SamplingParams` that the fields of a body set: none or one. Raises
    RequestError."""
    found = [
        (name, field, fields[name]) for name, field in _NAMES.items()
        if fields.get(name) is not None
    ]  # fmt: skip
    found += _response_format(fields.get("response_format"))
    found += _structured_outputs(fields.get("structured_outputs"))
    if len(found) > 1:
        raise RequestError(f"{found[0][0]} and {found[1][0]} exclude each other", found[1][0])
    return {field: tuple(value) if isinstance(value, list) else value for _, field, value in found}


def _response_format(value: Any) -> _Found:
    name = "response_format"
    kind = value.get("type") if isinstance(value, dict) else None
    if value is None or kind == "text":
        return []
    if kind == "json_object":
        return [(name, "json_schema", _ANY_OBJECT)]
    if kind == "structural_tag":
        return [(name, "structural_tag", value)]
    if kind == "json_schema":
        inner = value.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, dict) else None
        if not isinstance(schema, dict | bool):
            raise RequestError("response_format.json_schema.schema must be an object", name)
        return [(name, "json_schema", schema)]
    kinds = "text, json_object, json_schema or structural_tag"
    raise RequestError(f"response_format must be an object with type {kinds}", name)


def _structured_outputs(value: Any) -> _Found:
    name = "structured_outputs"
    if value is None:
        return []
    if not isinstance(value, dict):
        raise RequestError(f"{name} must be an object", name, code="invalid_type")
    found: _Found = []
    for key, inner in value.items():
        if inner is None or inner is False:
            continue
        if key == "json_object" and inner is True:
            found.append((name, "json_schema", _ANY_OBJECT))
        elif key in _STRUCTURED_OUTPUTS:
            found.append((name, _STRUCTURED_OUTPUTS[key], inner))
        else:
            raise RequestError(
                f"{name}.{key:.80} is not supported", name, code="unsupported_parameter"
            )
    return found

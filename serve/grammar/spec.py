"""The grammar of a request, as a client writes it: one kind and its text."""

import json
from dataclasses import dataclass
from typing import Any, NoReturn

from serve.grammar.json_schema import closed_schema
from serve.grammar.limits import MAX_CHOICES_OF_TEXT, MAX_GRAMMAR_CHARS, GrammarError

FIELDS = ("json_schema", "regex", "ebnf", "structural_tag", "choices")
"""Fields of `SamplingParams`, of which a request has at most one."""


@dataclass(frozen=True)
class GrammarSpec:
    """Key of the cache of compiled grammars."""

    kind: str
    """`json_schema`, `regex`, `ebnf` or `structural_tag`."""
    text: str


def make_spec(field: str, value: object) -> GrammarSpec:
    """The specification of one field. Raises GrammarError."""
    if field == "choices":
        return _checked(field, "structural_tag", _dump(field, _tag_of_choices(value)))
    if field == "json_schema":
        return _checked(field, field, _dump(field, closed_schema(_parsed(field, value))))
    if field == "structural_tag":
        tag = _closed_schemas(_from_legacy(_parsed(field, value)))
        return _checked(field, field, _dump(field, tag))
    if not isinstance(value, str):
        raise GrammarError(f"{field} must be a string")
    return _checked(field, field, value)


def _parsed(field: str, value: object) -> Any:
    """An object, or its JSON; its size is limited before anything else looks at it."""
    text = value if isinstance(value, str) else _dump(field, value)
    if len(text) > MAX_GRAMMAR_CHARS:
        raise GrammarError(f"{field} must have at most {MAX_GRAMMAR_CHARS} characters")
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=_refuse_constant)
    except RecursionError:
        raise GrammarError(f"{field} is nested too deep") from None
    except ValueError:
        raise GrammarError(f"{field} is not valid JSON") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _dump(field: str, value: object) -> str:
    if not isinstance(value, dict | bool):
        raise GrammarError(f"{field} must be an object or its JSON")
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)
    except RecursionError:
        raise GrammarError(f"{field} is nested too deep") from None
    except (TypeError, ValueError):
        raise GrammarError(f"{field} cannot be written as JSON") from None


def _checked(field: str, kind: str, text: str) -> GrammarSpec:
    if not text or len(text) > MAX_GRAMMAR_CHARS:
        raise GrammarError(f"{field} must have 1 to {MAX_GRAMMAR_CHARS} characters")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise GrammarError(f"{field} is not valid Unicode") from None
    if "\0" in text:
        raise GrammarError(f"{field} contains a null character")
    return GrammarSpec(kind, text)


def _tag_of_choices(value: object) -> dict[str, Any]:
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= MAX_CHOICES_OF_TEXT:
        raise GrammarError(f"choices must be a list of 1 to {MAX_CHOICES_OF_TEXT} texts")
    if not all(isinstance(text, str) and text for text in value):
        raise GrammarError("each of choices must be a text that is not empty")
    texts = [{"type": "const_string", "value": text} for text in dict.fromkeys(value)]
    only_one = {"type": "or", "elements": texts} if len(texts) > 1 else texts[0]
    return {"type": "structural_tag", "format": only_one}


def _from_legacy(tag: Any) -> Any:
    """The older form, `structures` and `triggers`, as the present one."""
    if not isinstance(tag, dict) or "structures" not in tag:
        return tag
    structures = tag["structures"]
    if not isinstance(structures, list) or not all(isinstance(one, dict) for one in structures):
        raise GrammarError("structural_tag: structures must be a list of objects")
    tags = [
        {
            "type": "tag",
            "begin": one.get("begin"),
            "content": {"type": "json_schema", "json_schema": one.get("schema", {})},
            "end": one.get("end"),
        }
        for one in structures
    ]
    triggered = {"type": "triggered_tags", "triggers": tag.get("triggers"), "tags": tags}
    return {"type": "structural_tag", "format": triggered}


def _closed_schemas(value: Any) -> Any:
    """A structural tag whose JSON schemas are checked.

    `otherwise` of a schema replaces one that is not enforced completely, which stays as
    `unsupported`, because it may be malformed. Other keys than those of formats are not followed,
    so a property of a schema is no format.
    """
    if isinstance(value, list):
        return [_closed_schemas(one) for one in value]
    if not isinstance(value, dict):
        return value
    found = {
        key: _closed_schemas(one) if key in ("format", "elements", "tags", "content") else one
        for key, one in value.items()
    }
    if found.get("type") == "json_schema" and "json_schema" in found:
        try:
            found["json_schema"] = closed_schema(found["json_schema"])
        except GrammarError:
            if "otherwise" not in found:
                raise
            found["unsupported"], found["json_schema"] = found["json_schema"], found["otherwise"]
    return found

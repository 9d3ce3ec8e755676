"""Which JSON schemas are enforced completely.

xgrammar ignores keywords that it cannot express, and those next to `$ref`, `const`, `enum`,
`anyOf`, `oneOf` and `allOf`. A text that matches its grammar could then violate the schema, so such
schemas are refused here. (What depends on values, such as whether the branches of `oneOf` exclude
each other, it reports when it compiles; those warnings are errors, see `compilation.py`.)

Objects have the listed properties only, unless `additionalProperties` allows others, as xgrammar
treats them. An object or array of which nothing is listed is unrestricted.
"""

import re
from collections.abc import Hashable
from typing import Any

from serve.grammar.limits import MAX_SCHEMA_DEPTH, GrammarError

_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = ("items", "additionalProperties", "propertyNames", "unevaluatedProperties",
            "unevaluatedItems")  # fmt: skip
_NOT_ENFORCED = {
    "not": (), "if": (), "then": (), "else": (), "contains": (), "minContains": (),
    "maxContains": (), "uniqueItems": (False,), "dependentRequired": ({},),
    "dependentSchemas": ({},), "dependencies": ({},), "additionalItems": (), "$dynamicRef": (),
    "$recursiveRef": (),
}  # fmt: skip
"""Keywords without effect in xgrammar, and values with which they have none by definition."""
_ALONE = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
"""Next to the first of these all other assertions have no effect in xgrammar."""
_OBJECTS = ("properties", "required", "minProperties", "maxProperties", "patternProperties",
            "additionalProperties", "propertyNames", "unevaluatedProperties")  # fmt: skip
_ARRAYS = ("items", "prefixItems", "minItems", "maxItems", "unevaluatedItems")
_STRINGS = ("minLength", "maxLength", "pattern")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_ASSERTIONS = {"type", *_OBJECTS, *_ARRAYS, *_STRINGS, *_NUMBERS, *_ALONE}
_OF_TYPE = {"object": _OBJECTS, "array": _ARRAYS, "string": _STRINGS, "number": _NUMBERS}
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_CLASS = re.compile(r"\\[pP]\{\^?[\w=]+\}")
"""A class of characters in Unicode's terms, which Python's expressions do not have."""
_MOST_COMPARED = 128
"""Branches of `oneOf` that are compared in pairs."""
_Keys = frozenset[Hashable]
_PYTHON = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}


def closed_schema(schema: Any, depth: int = 0) -> Any:
    """The schema for xgrammar. Raises GrammarError for one that it would not enforce."""
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, dict):
        raise GrammarError("json_schema: a schema must be an object, true or false")
    if depth > MAX_SCHEMA_DEPTH:
        raise GrammarError(f"json_schema is nested more than {MAX_SCHEMA_DEPTH} deep")
    for keyword, neutral in _NOT_ENFORCED.items():
        if keyword in schema and not any(schema[keyword] is one or (one == {} == schema[keyword])
                                         for one in neutral):  # fmt: skip
            raise GrammarError(f"json_schema: {keyword} is not supported")
    found = dict(schema)
    for keyword in _SCHEMA_MAPS:
        if isinstance(found.get(keyword), dict):
            found[keyword] = {k: closed_schema(v, depth + 1) for k, v in found[keyword].items()}
    for keyword in _SCHEMA_LISTS:
        if isinstance(found.get(keyword), list):
            found[keyword] = [closed_schema(one, depth + 1) for one in found[keyword]]
    for keyword in _SCHEMAS:
        if keyword in found:
            found[keyword] = closed_schema(found[keyword], depth + 1)
    branches = found.get("oneOf")
    if isinstance(branches, list) and _exclude_each_other(branches):
        found["anyOf"] = found.pop("oneOf")  # the library proves less, and warns of the others
    alone = next((keyword for keyword in _ALONE if keyword in found), None)
    if alone is not None:
        return _without_siblings(found, alone)
    return _closed_object(_closed_array(_closed_string(_typed(found))))


def refuse_malformed(schema: Any, depth: int = 0) -> None:
    """Raise GrammarError for what is no JSON schema, whether or not it could be enforced: an
    unknown type, a pattern that is no regular expression, parts of other types."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise GrammarError("json_schema: a schema must be an object, true or false")
    if depth > MAX_SCHEMA_DEPTH:
        raise GrammarError(f"json_schema is nested more than {MAX_SCHEMA_DEPTH} deep")
    kinds = schema.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind not in _TYPES:
            raise GrammarError(f"json_schema: type {str(kind)!r:.80} must be one of {_TYPES}")
    try:
        re.compile(_CLASS.sub(r"\\w", schema.get("pattern", "")))
    except (re.error, TypeError, OverflowError, RecursionError):
        raise GrammarError("json_schema: pattern is no regular expression") from None
    for keywords, kind in ((_SCHEMA_MAPS, dict), (_SCHEMA_LISTS, list)):
        for keyword in keywords:
            parts = schema.get(keyword, kind())
            if not isinstance(parts, kind):
                raise GrammarError(f"json_schema: {keyword} has the wrong type")
            for part in parts.values() if isinstance(parts, dict) else parts:
                refuse_malformed(part, depth + 1)
    for keyword in _SCHEMAS:
        if keyword in schema and not isinstance(schema[keyword], list):  # items once had lists
            refuse_malformed(schema[keyword], depth + 1)


def _without_siblings(schema: dict[str, Any], alone: str) -> dict[str, Any]:
    """Next to `alone` there may only be a type that does not restrict it further."""
    others = [key for key in schema if key in _ASSERTIONS - {alone, "type"}]
    if others:
        raise GrammarError(f"json_schema: {others[0]} next to {alone} is not supported")
    if "type" not in schema:
        return schema
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if alone in ("const", "enum"):
        values = [schema["const"]] if alone == "const" else schema["enum"]
        if not isinstance(values, list):
            raise GrammarError("json_schema: enum must be a list")
        kept = [value for value in values if any(_has_type(value, kind) for kind in kinds)]
        if not kept:
            raise GrammarError(f"json_schema: no value of {alone} has the type")
        return {key: one for key, one in schema.items() if key != alone} | {"enum": kept}
    branches = schema[alone] if isinstance(schema[alone], list) else []
    if not branches or not all(
        isinstance(one, dict) and _types(one) and _types(one) <= set(kinds) for one in branches
    ):
        raise GrammarError(f"json_schema: type next to {alone} needs a type in each branch")
    return schema


def _exclude_each_other(schemas: list[Any]) -> bool:
    """Whether a value certainly matches at most one of these schemas."""
    listed = [values for one in schemas if (values := _listed(one)) is not None]
    if len(listed) == len(schemas):
        return len(frozenset().union(*listed)) == sum(map(len, listed))
    if len(schemas) > _MOST_COMPARED:
        return False
    branches = [_Branch(one) for one in schemas]
    return all(a.excludes(b) for i, a in enumerate(branches) for b in branches[i + 1 :])


class _Branch:
    """What is known of the values of one of several schemas."""

    def __init__(self, schema: Any) -> None:
        is_object = isinstance(schema, dict)
        self.matches_nothing = schema is False
        self.values = _listed(schema)
        self.types = _types_of_values(schema) if is_object else set()
        self.required = _required_values(schema) if self.types == {"object"} else {}

    def excludes(self, other: "_Branch") -> bool:
        """By their types, their values, or the values of a property that both require."""
        if self.values is not None and other.values is not None:
            return self.values.isdisjoint(other.values)
        if self.types and other.types and not self.types & other.types:
            return True
        by_property = any(
            name in other.required and values.isdisjoint(other.required[name])
            for name, values in self.required.items()
        )
        return by_property or self.matches_nothing or other.matches_nothing


def _required_values(schema: dict[str, Any]) -> dict[str, _Keys]:
    """The listed values of the properties that an object must have."""
    properties, names = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict) or not isinstance(names, list):
        return {}
    found = {
        name: _listed(properties[name])
        for name in names if isinstance(name, str) and name in properties
    }  # fmt: skip
    return {name: values for name, values in found.items() if values is not None}


def _listed(schema: Any) -> _Keys | None:
    """Keys of the values that a schema lists, equal for values that are equal in JSON."""
    values = _values(schema)
    return None if values is None else frozenset(map(_key, values))


def _key(value: Any) -> Hashable:
    if isinstance(value, dict):
        return "object", frozenset((name, _key(one)) for name, one in value.items())
    if isinstance(value, list):
        return "array", tuple(map(_key, value))
    return (bool, value) if isinstance(value, bool) else value


def _values(schema: Any) -> list[Any] | None:
    """The values that a schema lists."""
    if not isinstance(schema, dict):
        return None
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    return values if isinstance(values, list) else None


def _types_of_values(schema: dict[str, Any]) -> set[str]:
    """Types of the values of a schema, an integer being a number; empty if they are not known."""
    values = _values(schema)
    if values is not None:
        names = ("boolean", "number", "string", "null", "object", "array")
        return {name for one in values for name in names if _is_of(one, name)}
    if any(key in schema for key in ("$ref", "anyOf", "oneOf", "allOf")):
        return set()
    return {"number" if kind == "integer" else kind for kind in _types(_typed(schema))}


def _is_of(value: object, kind: str) -> bool:
    return isinstance(value, list) if kind == "array" else _has_type(value, kind)


def _types(schema: dict[str, Any]) -> set[str]:
    kinds = schema.get("type", [])
    listed = kinds if isinstance(kinds, list) else [kinds]
    return {kind for kind in listed if isinstance(kind, str)}


def _has_type(value: object, kind: object) -> bool:
    if kind in ("number", "integer"):
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (whole or kind == "number")
    return isinstance(value, _PYTHON.get(str(kind), ()))


def _typed(schema: dict[str, Any]) -> dict[str, Any]:
    """Keywords without a type would restrict values of their type only; the grammar has only those
    values."""
    if "type" not in schema:
        kind = next((k for k, keys in _OF_TYPE.items() if any(key in schema for key in keys)), None)
        return schema if kind is None else schema | {"type": kind}
    return schema


def _closed_string(schema: dict[str, Any]) -> dict[str, Any]:
    """xgrammar reads the first of format, pattern and lengths. A format alone is an annotation, so
    it gives way to the others."""
    if "multipleOf" in schema and "number" in _types(schema):
        raise GrammarError("json_schema: multipleOf of a number is not supported")
    lengths = schema.get("minLength", 0) != 0 or "maxLength" in schema
    if "pattern" in schema and lengths:
        raise GrammarError("json_schema: pattern together with a length is not supported")
    if "format" in schema and ("pattern" in schema or lengths):
        return {key: one for key, one in schema.items() if key != "format"}
    return schema


def _closed_array(schema: dict[str, Any]) -> dict[str, Any]:
    if "array" not in _types(schema):
        return schema
    if not {"items", "prefixItems", "unevaluatedItems"} & schema.keys():
        schema["items"] = True
    if isinstance(schema.get("items"), list):
        raise GrammarError("json_schema: a list of items is not supported; use prefixItems")
    return schema


def _closed_object(schema: dict[str, Any]) -> dict[str, Any]:
    """Required properties that are not listed have any value."""
    if "object" not in _types(schema):
        return schema
    properties, others = schema.get("properties", {}), schema.get("additionalProperties")
    required = schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise GrammarError("json_schema: properties must be an object, required a list")
    if not all(isinstance(name, str) for name in required):
        raise GrammarError("json_schema: required must be a list of names")
    missing = [name for name in required if name not in properties]
    if missing and ("patternProperties" in schema or "propertyNames" in schema or others is False):
        raise GrammarError("json_schema: a required property is not among the properties")
    if missing:
        of_others = others if isinstance(others, dict) else True
        schema["properties"] = properties | dict.fromkeys(missing, of_others)
    open_ones = {"patternProperties", "additionalProperties", "propertyNames",
                 "unevaluatedProperties"}  # fmt: skip
    if (
        not schema.get("properties")
        and "properties" not in schema
        and not open_ones & schema.keys()
    ):
        schema["additionalProperties"] = True
    return schema

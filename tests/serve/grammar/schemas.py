"""Random JSON schemas that some short text satisfies."""

import random
from typing import Any

Schema = dict[str, Any]
_NAMES = ("name", "age", "size", "tags", "id", "state", "ünï", 'a "b"')
_PATTERNS = ("^[a-z]{1,4}$", "^[0-9]{2}-[A-Z]$", "^(yes|no)$", "[^a]{2}", "^\\w\\s\\d$", "^.$")
_FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email", "hostname")


def make_schema(rng: random.Random) -> Schema:
    schema = _object(rng, 2)
    schema.pop("maxProperties", None)
    if rng.random() < 0.3:
        schema["$defs"] = {"part": _leaf(rng)}
        schema.setdefault("properties", {})["part"] = {"$ref": "#/$defs/part"}
        schema.setdefault("required", []).append("part")
    if rng.random() < 0.2:
        properties: Schema = {"v": _leaf(rng)}
        properties["next"] = {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}
        node: Schema = {"type": "object", "properties": properties, "required": ["v"]}
        schema["$defs"] = schema.get("$defs", {}) | {"node": node}
        schema.setdefault("properties", {})["list"] = {"$ref": "#/$defs/node"}
    return schema


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(_NAMES, rng.randint(1, 3))
    schema: Schema = {
        "type": "object",
        "properties": {name: _any(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
    }
    kind = rng.random()
    if kind < 0.1:
        schema["additionalProperties"] = _leaf(rng)
    elif kind < 0.4:
        schema["additionalProperties"] = False
    elif kind < 0.5:
        schema["minProperties"] = 1
        schema["maxProperties"] = max(1, len(schema["required"]))
    elif kind < 0.55:
        return {"type": "object", "patternProperties": {"^x_[a-z]$": _leaf(rng)},
                "additionalProperties": False, "maxProperties": 2}  # fmt: skip
    return schema


def _any(rng: random.Random, depth: int) -> Schema:
    kind = rng.random()
    if depth > 0 and kind < 0.25:
        return _object(rng, depth)
    if depth > 0 and kind < 0.45:
        low = rng.randint(0, 2)
        items = _any(rng, depth - 1)
        if rng.random() < 0.3:
            return {"type": "array", "prefixItems": [items, _leaf(rng)], "items": False}
        return {"type": "array", "items": items, "minItems": low, "maxItems": low + 2}
    if kind < 0.55:
        return {"anyOf": [_leaf(rng), _leaf(rng)]}
    if kind < 0.6:
        return {"oneOf": [{"type": "integer", "maximum": 3}, {"type": "string", "maxLength": 2}]}
    if kind < 0.63:
        return {"allOf": [_leaf(rng)]}
    if kind < 0.66:
        return {"type": ["integer", "null", "boolean"]}
    return _leaf(rng)


def _leaf(rng: random.Random) -> Schema:
    low = rng.randint(-50, 50)
    leaves: tuple[Schema, ...] = (
        {"type": "boolean"},
        {"type": "null"},
        {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 200)},
        {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + 3},
        {"type": "integer", "minimum": 0, "maximum": 90, "multipleOf": 5},
        {"type": "number", "minimum": low, "maximum": low + 10},
        {"type": "number", "exclusiveMinimum": low + 0.25, "exclusiveMaximum": low + 0.5},
        {"type": "string", "maxLength": rng.randint(1, 8)},
        {"type": "string", "minLength": 2, "maxLength": rng.randint(2, 5)},
        {"type": "string", "pattern": rng.choice(_PATTERNS)},
        {"type": "string", "format": rng.choice(_FORMATS)},
        {"enum": ["active", "ü", 3, None, True, {"a": [1]}, 'q"\\']},
        {"type": "string", "enum": ["on", "off", 3]},
        {"const": "fixed value"},
        {"const": {"k": [1, 2.5, None]}},
    )
    return dict(rng.choice(leaves))

"""Schemas that xgrammar would not enforce are refused; the others keep their meaning."""

import contextlib
import time
from typing import Any

import pytest

from serve.grammar.json_schema import closed_schema, refuse_malformed
from serve.grammar.limits import GrammarError
from serve.grammar.spec import make_spec


@pytest.mark.parametrize(
    "schema",
    [
        {"not": {}},
        {"type": "array", "uniqueItems": True},
        {"type": "array", "contains": {}},
        {"type": "object", "properties": {"a": {"if": {}, "then": {}}}},
        {"anyOf": [{"not": {}}]},
        {"type": "object", "dependentRequired": {"a": ["b"]}},
        {"$ref": "#/$defs/a", "minLength": 1, "$defs": {"a": {}}},
        {"anyOf": [{"type": "string"}], "required": ["a"]},
        {"anyOf": [{}, {"type": "string"}], "type": "string"},
        {"type": "string", "pattern": "a", "maxLength": 3},
        {"type": "number", "multipleOf": 0.1},
        {"type": "integer", "enum": ["a"]},
        {"type": "object", "required": ["a"], "additionalProperties": False},
        {"type": "array", "items": [{}, {}]},
        {"type": "object", "properties": {"a": 3}},
        [],
    ],
)
def test_refused(schema: Any) -> None:
    with pytest.raises(GrammarError):
        closed_schema(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "strange"}, {"type": ["string", 3]}, {"pattern": "("}, {"pattern": 3}, [], None,
        {"not": {}, "properties": {"a": {"pattern": "["}}}, {"items": {"type": {}}},
        {"properties": []}, {"anyOf": {}}, {"$defs": {"a": {"oneOf": [{"type": ""}]}}},
    ],
)  # fmt: skip
def test_malformed(schema: Any) -> None:
    with pytest.raises(GrammarError, match="json_schema"):
        refuse_malformed(schema)


def test_what_is_not_enforced_may_be_well_formed() -> None:
    refuse_malformed({"not": {}, "items": [{}, {}], "pattern": r"^\p{L}+(?=a)\P{Lu}$", "type": []})
    refuse_malformed({"properties": {"type": {"type": ["null", "integer"]}}, "x": 5})


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "object"}, {"type": "object", "additionalProperties": True}),
        ({"type": "array"}, {"type": "array", "items": True}),
        (
            {"type": "object", "properties": {}, "required": ["a"]},
            {"type": "object", "properties": {"a": True}, "required": ["a"]},
        ),
        ({"minimum": 3}, {"minimum": 3, "type": "number"}),
        (
            {"type": "string", "format": "date", "maxLength": 3},
            {"type": "string", "maxLength": 3},
        ),
        ({"type": "string", "enum": ["a", 1]}, {"type": "string", "enum": ["a"]}),
        ({"type": "array", "items": {}, "uniqueItems": False}, None),
        # properties with the names of keywords
        ({"type": "object", "properties": {"not": {"type": "null"}, "if": {"type": "null"}}}, None),
        (True, None),
    ],
)
def test_accepted(schema: Any, expected: Any) -> None:
    assert closed_schema(schema) == (schema if expected is None else expected)


def test_specifications() -> None:
    assert make_spec("json_schema", {"a": 1}) == make_spec("json_schema", '{"a":1}')
    with pytest.raises(GrammarError, match="null character"):
        make_spec("regex", "a\0")
    with pytest.raises(GrammarError, match="must be a string"):
        make_spec("ebnf", {"a": 1})
    with pytest.raises(GrammarError, match="not valid JSON"):
        make_spec("json_schema", "NaN")


KIND: dict[str, Any] = {"type": "object", "required": ["kind"]}


@pytest.mark.parametrize(
    ("branches", "excluded"),
    [
        ([{"type": "integer"}, {"type": "string"}, {"type": ["null", "boolean"]}], True),
        ([{"type": "integer"}, {"type": "number"}], False),
        ([{"enum": [1, 2]}, {"const": 3}], True),
        ([{"enum": [1, 2]}, {"const": 1.0}], False),
        ([{"const": "a"}, {"type": "array", "items": {}}], True),
        ([{"const": "a"}, {"type": "string"}], False),
        ([{"type": "string"}, {}], False),
        (
            [KIND | {"properties": {"kind": {"const": one}}} for one in ("a", "b")],
            True,
        ),
        (
            [KIND | {"properties": {"kind": {"enum": ["a", one]}}} for one in ("a", "b")],
            False,
        ),
    ],
)
def test_branches_that_exclude_each_other(branches: Any, excluded: bool) -> None:
    """The library proves less; it warns of the others, which is an error (`compilation`)."""
    assert ("anyOf" in closed_schema({"oneOf": branches})) == excluded


@pytest.mark.parametrize(
    ("branches", "excluded"),
    [
        ([{"const": 1}, {"const": 1.0}], False),
        ([{"const": 1}, {"const": True}], True),
        ([{"enum": [1, 1, 2]}, {"enum": [3, "1"]}], True),
        ([{"const": {"a": [1]}}, {"const": {"a": [1.0]}}], False),
        ([{"const": [1]}, {"const": {"a": 1}}, False, {"enum": [[1, 2]]}], True),
    ],
)
def test_values_are_compared_as_in_json(branches: Any, excluded: bool) -> None:
    assert ("anyOf" in closed_schema({"oneOf": branches})) == excluded


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": [{"const": n} for n in range(9000)]},
        {"oneOf": [{"enum": list(range(20_000))}, {"enum": list(range(20_000, 40_000))}]},
        {"oneOf": [{"type": "object", "properties": {"k": {"const": n}}, "required": ["k"]}
                   for n in range(3000)]},
        {"oneOf": [{"type": "object", "properties": {f"k{i}": {"const": 0} for i in range(60)},
                    "required": [f"k{i}" for i in range(60)]} for _ in range(100)]},
        {"anyOf": [{"enum": list(range(30_000))}] + [{"type": "object"}] * 20},
    ],
)  # fmt: skip
def test_large_schemas_are_read_in_little_time(schema: Any) -> None:
    """Branches and values were compared in pairs, for minutes, beside the engine's thread."""
    begin = time.thread_time()
    with contextlib.suppress(GrammarError):
        make_spec("json_schema", schema)
    assert time.thread_time() - begin < 1.5


def test_the_size_is_limited_first() -> None:
    with pytest.raises(GrammarError, match="at most 262144 characters"):
        make_spec("json_schema", {"not": {"enum": ["a" * 300_000]}})

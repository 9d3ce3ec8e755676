"""The grammar of an answer that may have calls, as a structural tag of xgrammar.

A text of the form that is a special token of the tokenizer is that token; otherwise it is text, in
whatever tokens.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve.text.alternatives import longest_of
from serve.tool_calls.forms import END_THINK, THINK, Form, HarmonyForm, JsonForm, XmlForm
from serve.tool_calls.harmony import MARKS as HARMONY_MARKS
from serve.tool_calls.xml_arguments import kinds_of

Json = dict[str, Any]
_MOST_SHARED = 1 << 18
"""Characters of definitions that the values of one tool may have together."""


@dataclass(frozen=True)
class Tool:
    """A function that may be called. schema: of its arguments."""

    name: str
    schema: Any
    is_strict: bool = False
    """Whether a schema that cannot be enforced completely is an error; otherwise it is not enforced
    then."""


class Structure:
    """Makes the grammars of a form.

    special: the special tokens of the tokenizer, by text. end_tokens: of the model.
    """

    def __init__(
        self, form: Form, special: Mapping[str, int], end_tokens: frozenset[int], thinks: bool
    ) -> None:
        self.form = form
        self.special = special
        self.end_tokens = end_tokens
        self.thinks = thinks

    def tag(
        self, tools: Sequence[Tool], free_text: bool, one_only: bool, in_reasoning: bool
    ) -> Json:
        """The structural tag.

        Args:
            tools: The functions that may be called.
            free_text: Whether there may be other text, and no call.
            one_only: Whether there is at most one call.
            in_reasoning: Whether the prompt ends in reasoning.
        """
        if isinstance(self.form, HarmonyForm):
            found = self._harmony(tools, free_text)
        else:
            found = self._triggered(tools, one_only) if free_text else sequence(
                self._calls(tools, one_only)
            )  # fmt: skip
            if self.thinks:
                found = sequence([*self._reasoning(in_reasoning), found])
        return {"type": "structural_tag", "format": found}

    def around(self, grammar: Mapping[str, Any], in_reasoning: bool) -> Json:
        """The grammar of an answer's content, as that of the whole text: fields of
        `SamplingParams`, as `grammar` is."""
        is_harmony = isinstance(self.form, HarmonyForm)
        name, value = next(iter(grammar.items()), ("", ()))
        if not (is_harmony or self.thinks) or name in ("", "structural_tag"):
            return dict(grammar)
        try:
            if name == "json_schema":
                schema = json.loads(value) if isinstance(value, str) else value
                inner: Json = {"type": "json_schema", "json_schema": schema}
            elif name == "choices":
                inner = either([{"type": "const_string", "value": one} for one in value])
            else:
                kind, key = ("regex", "pattern") if name == "regex" else ("grammar", "grammar")
                inner = {"type": kind, key: value}
        except (ValueError, TypeError, RecursionError):
            return dict(grammar)  # it is refused later
        if is_harmony:
            final = [*self._literal("<|channel|>final<|message|>"), inner]
            before = {"type": "star", "content": self._message("analysis")}
            found = sequence([before, *final])
        else:
            found = sequence([*self._reasoning(in_reasoning), inner])
        return {name: None, "structural_tag": {"type": "structural_tag", "format": found}}

    @property
    def shown(self) -> tuple[int, ...]:
        """Special tokens that a parser needs in the text."""
        marks = [*self.form.marks, THINK if self.thinks else "", END_THINK if self.thinks else ""]
        if isinstance(self.form, HarmonyForm):
            marks += HARMONY_MARKS
        if isinstance(self.form, JsonForm):
            marks.append(self.form.identifier)
        if isinstance(self.form, XmlForm):
            marks += self.form.key, self.form.value, self.form.value_end
        return tuple(sorted(
            token for text, token in self.special.items() if any(text in mark for mark in marks)
        ))  # fmt: skip

    def _literal(self, text: str) -> list[Json]:
        """A text in parts: special tokens, and what is between them."""
        found: list[Json] = []
        at = 0
        for match in _pattern(tuple(self.special)).finditer(text):
            if match.start() > at:
                found.append({"type": "const_string", "value": text[at : match.start()]})
            found.append({"type": "token", "token": self.special[match[0]]})
            at = match.end()
        if at < len(text):
            found.append({"type": "const_string", "value": text[at:]})
        return found

    def _until(self, begin: str, content: Json, end: str) -> Json:
        """Text up to `end`; white space of `end` that precedes a token is not required."""
        final = self._literal(end)
        at = next((i for i, one in enumerate(final) if one["type"] == "token"), None)
        ends, rest = (end, []) if at is None else (final[at], final[at + 1 :])
        tag = {"type": "tag", "begin": "", "content": content, "end": ends}
        return sequence([*self._literal(begin), tag, *rest])

    def _call(self, tool: Tool) -> list[Json]:
        form = self.form
        begin = self._literal(form.begin + tool.name + form.middle)
        if isinstance(form, JsonForm) and form.identifier:
            begin = [
                *self._literal(form.begin + tool.name + form.identifier),
                {"type": "regex", "pattern": "[a-zA-Z0-9]{9}"},
                *self._literal(form.middle),
            ]
        if isinstance(form, XmlForm):
            return [*begin, *self._elements(form, tool), *self._literal(form.end)]
        return [*begin, _json_of(tool, tool.schema, {"type": "object"}), *self._literal(form.end)]

    def _calls(self, tools: Sequence[Tool], one_only: bool) -> list[Json]:
        """All calls, with what is before the first and after the last."""
        form = self.form
        one = either([sequence(self._call(tool)) for tool in tools])
        more = sequence([*self._literal(form.separator), one])
        rest = [] if one_only else [{"type": "star", "content": more}]
        return [*self._literal(form.opens), one, *rest, *self._literal(form.closes)]

    def _triggered(self, tools: Sequence[Tool], one_only: bool) -> Json:
        """Free text in which calls may begin."""
        form = self.form
        if form.opens:
            bodies = [self._calls(tools, one_only)]
        else:
            bodies = [self._call(tool) for tool in tools]
        common = {"at_least_one": False, "stop_after_first": one_only}
        first = bodies[0][0]
        if first["type"] == "token":
            n_common = 1 if form.end else 0  # all end in the same way
            starts = [one[1 : len(one) - n_common] for one in bodies]
            rest = [
                either([sequence(one) for one in starts]),
                *bodies[0][len(bodies[0]) - n_common :],
            ]
            others = [token for token in self.shown if token != first["token"]]
            return common | {"type": "token_triggered_tags", "trigger_tokens": [first["token"]],
                             "exclude_tokens": others, "tags": [_tag([first, *rest])]}  # fmt: skip
        tags = [_tag(one) for one in bodies]
        triggers = [form.trigger] if form.trigger else [tag["begin"] for tag in tags]
        return common | {"type": "triggered_tags", "triggers": triggers, "tags": tags}

    def _reasoning(self, in_reasoning: bool) -> list[Json]:
        spaces = {"type": "regex", "pattern": "\n{0,2}"}
        text = {"type": "any_text"}
        if in_reasoning:
            return [self._until("", text, END_THINK), spaces]
        whole = sequence([self._until(THINK, text, END_THINK), spaces])
        return [{"type": "optional", "content": whole}]

    def _elements(self, form: XmlForm, tool: Tool) -> list[Json]:
        """The elements of the arguments, in the order of the schema."""
        schema = tool.schema if isinstance(tool.schema, dict) else {}
        properties = schema.get("properties")
        if not isinstance(properties, dict) or not properties:
            if properties == {} and schema.get("additionalProperties") is not True:
                return []
            key = [{"type": "regex", "pattern": "[A-Za-z_][A-Za-z0-9_-]{0,63}"},
                   *self._literal(form.value)]  # fmt: skip
            text = self._until("", {"type": "any_text"}, form.value_end)
            return [{"type": "star", "content": sequence([*self._literal(form.key), *key, text])}]
        required, kinds = schema.get("required") or [], kinds_of(schema)
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        if len(json.dumps(shared)) * list(kinds.values()).count("json") > _MOST_SHARED:
            shared = {}  # each value would have a copy: references have no target then
        found = []
        for name, one in properties.items():
            begin = form.key + name + form.value
            if kinds[name] == "json":
                inner = one | shared if isinstance(one, dict) else one
                value = _json_of(tool, inner, True)
                element = sequence([*self._literal(begin), value, *self._literal(form.value_end)])
            else:
                element = self._text_element(form, begin, one)
            is_required = isinstance(required, list) and name in required
            found.append(element if is_required else {"type": "optional", "content": element})
        return found

    def _text_element(self, form: XmlForm, begin: str, schema: Any) -> Json:
        values = schema.get("enum") or [schema["const"]] if isinstance(schema, dict) and (
            "enum" in schema or "const" in schema) else []  # fmt: skip
        texts = [one if isinstance(one, str) else json.dumps(one) for one in values]
        if not texts:
            pattern = schema.get("pattern") if isinstance(schema, dict) else None
            if isinstance(pattern, str) and pattern.startswith("^") and pattern.endswith("$"):
                content: Json = {"type": "regex", "pattern": pattern[1:-1]}
                return sequence([*self._literal(begin), content, *self._literal(form.value_end)])
            return self._until(begin, {"type": "any_text"}, form.value_end)
        listed = either([{"type": "const_string", "value": one} for one in texts])
        return sequence([*self._literal(begin), listed, *self._literal(form.value_end)])

    def _harmony(self, tools: Sequence[Tool], free_text: bool) -> Json:
        """Messages, of which the last is the answer or a call."""
        end = "" if self.special.get("<|call|>", -1) in self.end_tokens else "<|call|>"
        last = []
        for tool in tools:
            content = _json_of(tool, tool.schema, {"type": "object"})
            to = f" to=functions.{tool.name}"
            for header in (
                f"{to}<|channel|>commentary json<|message|>",
                f"{to}<|channel|>commentary <|constrain|>json<|message|>",
                f"<|channel|>commentary{to} <|constrain|>json<|message|>",
            ):
                last.append(sequence([*self._literal(header), content, *self._literal(end)]))
        before = [self._message("analysis")]
        if free_text:
            before.append(self._message("commentary"))
            final = self._literal("<|channel|>final<|message|>")
            last.append(sequence([*final, {"type": "any_text"}]))
        return sequence([{"type": "star", "content": either(before)}, either(last)])

    def _message(self, channel: str) -> Json:
        """A message that another one follows."""
        begin = f"<|channel|>{channel}<|message|>"
        text = self._until(begin, {"type": "any_text"}, "<|end|>")
        return sequence([text, *self._literal("<|start|>assistant")])


@functools.lru_cache(maxsize=8)
def _pattern(texts: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(longest_of(texts))


def sequence(elements: Sequence[Json]) -> Json:
    if not elements:
        return {"type": "const_string", "value": ""}
    return elements[0] if len(elements) == 1 else {"type": "sequence", "elements": list(elements)}


def either(elements: Sequence[Json]) -> Json:
    return elements[0] if len(elements) == 1 else {"type": "or", "elements": list(elements)}


def _tag(parts: Sequence[Json]) -> Json:
    """Parts of a text as a tag, which begins with the first."""
    begin, last = parts[0], parts[-1]
    has_end = last["type"] in ("const_string", "token")
    content = sequence(parts[1:-1] if has_end else parts[1:])
    return {"type": "tag", "begin": begin.get("value", begin), "content": content,
            "end": last.get("value", last) if has_end else ""}  # fmt: skip


def _json_of(tool: Tool, schema: Any, otherwise: Any) -> Json:
    """JSON of a schema. otherwise: the schema if that one cannot be enforced."""
    found = {"type": "json_schema", "json_schema": schema}
    return found if tool.is_strict else found | {"otherwise": otherwise}

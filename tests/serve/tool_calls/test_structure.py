"""The grammar of each form allows what templates write, and calls of the given tools only."""

import json
import os
import signal
import time
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from serve.api.tools import MessageParser
from serve.grammar import compilation
from serve.grammar.matching import Matcher, unpack_compiled
from serve.grammar.spec import make_spec
from serve.grammar.vocabulary import Vocabulary, make_vocabulary
from serve.tool_calls.choice import choose_format
from serve.tool_calls.forms import FORMS
from serve.tool_calls.structure import Structure, Tool
from serve.tool_calls.xml_arguments import kinds_of
from tests.serve.tool_calls.forms import MARKS, REASONING, SINGLE, TOOLS, WRITTEN


@pytest.fixture(scope="module", params=[False, True], ids=["text", "special"])
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    """Bytes, and the marks of all forms as added tokens, special or not."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", normalized=False), AddedToken("<other>")])
    marks = [AddedToken(mark, special=request.param, normalized=False) for mark in MARKS]
    (tokenizer.add_special_tokens if request.param else tokenizer.add_tokens)(marks)
    return make_vocabulary(tokenizer, {256}, tokenizer.get_vocab_size())


def alternating(names: Iterable[str]) -> list[Any]:
    """Every form with one vocabulary by default, its neighbor with the other."""
    return [
        pytest.param(special, name, id=f"{name}-{'special' if special else 'text'}",
                     marks=[pytest.mark.slow] * ((place + special) % 2))
        for place, name in enumerate(names)
        for special in (False, True)
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def no_limit(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of the child that compiles, which is this process here: no timer, and stderr comes back."""
    monkeypatch.setattr(compilation, "PROBE_CPU_SECONDS", 60)
    own = os.dup(2)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    os.dup2(own, 2)
    os.close(own)


def compiled(vocabulary: Vocabulary, tag: Any) -> tuple[Any, list[int]]:
    spec = make_spec("structural_tag", tag)
    return unpack_compiled(
        compilation.compile_grammar(vocabulary, spec.kind, spec.text), vocabulary
    )


def allows(vocabulary: Vocabulary, grammar: tuple[Any, list[int]], text: str) -> bool:
    """Whether the tokens of a text are allowed, and are those that are forced."""
    matcher = Matcher(grammar[0], vocabulary, False, grammar[1])
    tokens = vocabulary.tokenizer.encode(text, add_special_tokens=False).ids
    forced, finished = matcher.advance([])
    at = len(forced)
    if tokens[:at] != forced:
        return False
    while at < len(tokens):
        word, bit = divmod(tokens[at], 32)
        if finished or not (int(matcher.mask[0, word]) >> bit) & 1:
            return False
        forced, finished = matcher.advance([tokens[at]])
        at += 1
        if tokens[at : at + len(forced)] != forced:
            return False
        at += len(forced)
    return finished or bool(matcher.matcher.is_completed())


def structure(vocabulary: Vocabulary, name: str, thinks: bool) -> Structure:
    added = vocabulary.tokenizer.get_added_tokens_decoder()
    special = {one.content: token for token, one in added.items() if one.special}
    return Structure(FORMS[name], special, frozenset({256}), thinks)


@pytest.mark.parametrize(("vocabulary", "name"), alternating(FORMS), indirect=["vocabulary"])
def test_what_templates_write_is_allowed(vocabulary: Vocabulary, name: str) -> None:
    made, written = structure(vocabulary, name, name != "harmony"), WRITTEN[name]
    thought = REASONING.get(name, "<think>\nWell < so.\n</think>\n\n")
    required = compiled(vocabulary, made.tag(TOOLS, False, False, False))
    auto = compiled(vocabulary, made.tag(TOOLS, True, False, False))
    for grammar in (required, auto):
        assert allows(vocabulary, grammar, written)
        assert allows(vocabulary, grammar, thought + written)
        assert not allows(vocabulary, grammar, "<other>" + written)
        assert not allows(vocabulary, grammar, written.replace('{"a": 1', '{"a": "1').replace(
            "<arg_value>1<", "<arg_value>x<").replace("=a>\n1\n", "=a>\nx\n"))  # fmt: skip
    text = "<|channel|>final<|message|>Hello" if name == "harmony" else "Hello <b>"
    assert allows(vocabulary, auto, text) and not allows(vocabulary, required, text)
    if name not in ("harmony", "llama_json"):
        assert allows(vocabulary, auto, "Hello.\n" + written)
        assert not allows(vocabulary, auto, written.replace("add", "sub"))
    assert not allows(vocabulary, required, written.replace("add", "sub"))


@pytest.mark.parametrize(
    ("vocabulary", "name"),
    alternating(name for name in FORMS if name not in SINGLE),
    indirect=["vocabulary"],
)
def test_one_call(vocabulary: Vocabulary, name: str) -> None:
    form, made = FORMS[name], structure(vocabulary, name, True)
    one = form.opens + form.write("stop", {}, "abcdefgh1") + form.end
    two = one + form.separator + form.write("stop", {}, "abcdefgh1") + form.end
    for free_text in (False, True):
        grammar = compiled(vocabulary, made.tag(TOOLS, free_text, True, True))
        assert allows(vocabulary, grammar, "so\n</think>\n" + one + form.closes)
        assert not allows(vocabulary, grammar, "so\n</think>\n" + two + form.closes)
        assert not allows(vocabulary, grammar, one + form.closes)


def test_a_schema_that_cannot_be_enforced(vocabulary: Vocabulary) -> None:
    """It is an error only of a strict tool."""
    made = structure(vocabulary, "hermes", False)
    for schema in ({"type": "object", "not": {}}, {"type": "object", "properties": {
            "a": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}}):  # fmt: skip
        grammar = compiled(vocabulary, made.tag([Tool("f", schema)], False, True, False))
        text = FORMS["hermes"].write("f", {"b": [1]}, "") + FORMS["hermes"].end
        assert allows(vocabulary, grammar, text) or "properties" in schema
        with pytest.raises(ValueError):
            compiled(vocabulary, made.tag([Tool("f", schema, True)], False, True, False))


@pytest.mark.parametrize("name", [name for name in FORMS if name != "harmony"])
@pytest.mark.parametrize("as_text", [False, True])
def test_the_form_is_that_of_the_template(name: str, as_text: bool) -> None:
    form = FORMS[name]

    def render(variables: dict[str, Any]) -> str | None:
        (call,) = variables["messages"][1]["tool_calls"]
        arguments = call["function"]["arguments"]
        if isinstance(arguments, str) != as_text or variables["messages"][1]["content"] is None:
            return None  # as a template that concatenates texts
        found = json.loads(arguments) if as_text else arguments
        return "<s>" + form.opens + form.write(call["function"]["name"], found, call["id"])

    chosen = choose_format("{{ messages }}</think>", render)
    assert (chosen.form, chosen.arguments_as_text) == (form, as_text)
    assert chosen.empty_content and chosen.thinks
    assert choose_format("", render, "hermes").form == FORMS["hermes"]
    assert choose_format("<|channel|><|message|>", render).form == FORMS["harmony"]
    assert choose_format("", lambda _: None).form == FORMS["hermes"]


def test_hostile_tools_cost_little_time() -> None:
    """References to references, names of special tokens, definitions for each of many values."""
    endless = {"anyOf": [{"$ref": "#/$defs/A"}] * 60}
    marked = {"<|end|>" * 20_000 + str(n): {"type": "string"} for n in range(2)}
    many = {f"p{n}": {"type": "integer"} for n in range(2000)}
    shared = {f"d{n}": {"type": "string"} for n in range(2000)}
    special = {f"<|reserved_{n}|>": n for n in range(300)} | {"<|end|>": 300}
    structure = Structure(FORMS["qwen3_coder"], special, frozenset(), False)
    for schema in (
        {"properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": endless}},
        {"properties": marked},
        {"properties": many, "$defs": shared},
    ):
        begin = time.thread_time()
        MessageParser(FORMS["qwen3_coder"], [Tool("f", schema)])
        tag = structure.tag([Tool("f", schema)], True, False, False)
        assert len(json.dumps(tag)) < 10_000_000
        assert time.thread_time() - begin < 1.0


def test_kinds_follow_references() -> None:
    schema = {
        "properties": {"a": {"$ref": "#/$defs/A"}, "b": {"$ref": "#/$defs/B"}, "c": {"$ref": "x"}},
        "$defs": {"A": {"anyOf": [{"const": "x"}, {"$ref": "#/$defs/C"}]}, "C": {"type": "string"},
                  "B": {"oneOf": [{"$ref": "#/$defs/C"}, {"$ref": "#/$defs/B"}]}},
    }  # fmt: skip
    assert kinds_of(schema) == {"a": "text", "b": "any", "c": "any"}

"""Renders calls with official chat templates, and parses what they wrote.

`python -m scripts.check_clients.tool_calls FOLDER` does it with every `*.jinja` of it, for random
arguments and random divisions of the text. The source archive of llama-cpp-python has the templates
of most models:

    pip download --no-deps --no-binary :all: --no-build-isolation llama-cpp-python==0.3.36
    tar xf llama_cpp_python-0.3.36.tar.gz --wildcards "*/models/templates/*"
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError

from serve.api.tools import MessageParser
from serve.frontend.template_child import compiled
from serve.tool_calls.choice import ChatFormat, choose_format
from serve.tool_calls.forms import THINK
from serve.tool_calls.reasoning import ReasoningParser
from serve.tool_calls.structure import Tool

_TOKENS = {"bos_token": "<BOS>", "eos_token": "<EOS>"}
_PROPERTIES = {
    "text": {"type": "string"},
    "value": {"type": ["number", "boolean", "null", "array", "object"]},
    "x-y": {"type": "string"},
}
_TOOLS = [
    Tool("get_it", {"type": "object", "properties": _PROPERTIES}),
    Tool("b.c", {"type": "object", "properties": {}}),
]
_PIECES = ["a", "é", "日本", '"', "\\", "\n", "\t", "'", "<", ">", "{", "}", "[", "]", " ", "</",
           "tool_call", "🙂", ",", ":", "\u2028", "1", "null"]  # fmt: skip
_ENDS = ("<|im_end|>\n", "<EOS>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|eot_id|>")
_SINGLE = ("harmony", "llama_json")


def main(arguments: Sequence[str]) -> int:
    """Exit status 1 if a template's calls were not found again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args(arguments)
    wrong = 0
    for path in sorted(options.folder.glob("*.jinja")):
        try:
            wrong += check(path, options.rounds)
        except TemplateError as error:
            print(f"{path.name}: {str(error).splitlines()[0]}")
    return 1 if wrong else 0


def check(path: Path, rounds: int) -> int:
    """Print a line for a template; returns the number of failed rounds."""
    template = compiled(path.read_text())

    def render(variables: dict[str, Any]) -> str | None:
        try:
            return template.render(**variables, **_TOKENS)
        except Exception:  # a template can fail in any way
            return None

    found = choose_format(path.read_text(), render)
    if not found.is_known:
        print(f"{path.name}: writes no calls in a known form")
        return 0
    try:
        failed = sum(not round_trip(template, found, random.Random(i)) for i in range(rounds))
    except (TemplateError, TypeError, ValueError, RecursionError) as error:
        print(f"{path.name}: {found.form.name}; it fails with these tools: {str(error)[:60]}")
        return 0
    print(f"{path.name}: {found.form.name}; {rounds - failed} of {rounds} round trips")
    return failed


def round_trip(template: Template, found: ChatFormat, rng: random.Random) -> bool:
    """Whether random calls are those that the parser finds in the template's text."""
    n_calls = 1 if found.form.name in _SINGLE else rng.randint(1, 3)
    calls = []
    for _ in range(n_calls):
        tool = rng.choice(_TOOLS)
        calls.append((tool.name, _arguments(rng) if tool is _TOOLS[0] else {}))
    text, is_open = _written(template, found, calls)
    own = ReasoningParser(is_open) if found.thinks else None
    parser = MessageParser(found.form, _TOOLS, False, own)
    while True:
        size = rng.choice([1, 3, 10, 1000])
        parser.add(text[:size], len(text) <= size)
        text = text[size:]
        if not text:
            break
    functions = [call["function"] for call in parser.calls]
    return [(one["name"], json.loads(one["arguments"])) for one in functions] == calls


def _written(
    template: Template, found: ChatFormat, calls: list[tuple[str, dict[str, Any]]]
) -> tuple[str, bool]:
    """The template's text of a reply, and whether the prompt begins its reasoning."""
    listed = []
    for i, (name, arguments) in enumerate(calls):
        written = json.dumps(arguments, ensure_ascii=False)
        function = {"name": name, "arguments": written if found.arguments_as_text else arguments}
        listed.append({"id": f"abcdefgh{i}", "type": "function", "function": function})
    user: list[dict[str, Any]] = [{"role": "user", "content": "q"}]
    content = "" if found.empty_content else None
    reply = {"role": "assistant", "content": content, "tool_calls": listed}
    tools = [
        {"type": "function", "function": {
            "name": tool.name, "description": "d", "parameters": tool.schema}}
        for tool in _TOOLS
    ]  # fmt: skip
    more: dict[str, Any] = {"tools": tools, **_TOKENS}
    whole = template.render(messages=[*user, reply], add_generation_prompt=False, **more)
    prompt = template.render(messages=user, add_generation_prompt=True, **more)
    is_open = whole.startswith(prompt) and prompt.rstrip().endswith(THINK)
    at = next((i for i, pair in enumerate(zip(whole, prompt, strict=False))
               if pair[0] != pair[1]), len(prompt))  # fmt: skip
    if at < len(prompt):  # the prompt and the reply differ inside a mark
        at = max(whole.rfind("<", 0, at + 1), whole.rfind("\n", 0, at) + 1, 0)
    text = whole[at:]
    for end in _ENDS:
        text = text.removesuffix(end)
    return text, is_open


def _arguments(rng: random.Random) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in _PROPERTIES:
        if rng.random() < 0.7:
            value = _value(rng, 0) if name == "value" else _text(rng)
            found[name] = [value] if name == "value" and isinstance(value, str) else value
    return found


def _text(rng: random.Random) -> str:
    return "".join(rng.choice(_PIECES) for _ in range(rng.randint(0, 12)))


def _value(rng: random.Random, depth: int) -> Any:
    kind = rng.randint(0, 6 if depth < 3 else 4)
    if kind == 5:
        return [_value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    if kind == 6:
        return {_text(rng): _value(rng, depth + 1) for _ in range(rng.randint(0, 3))}
    plain = [_text(rng), rng.randint(-(10**6), 10**6), rng.random() * 1e3, rng.random() < 0.5, None]
    return plain[kind]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

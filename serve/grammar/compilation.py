"""Compiles one grammar. Runs in a process of its own, which may crash (`serve.grammar.worker`)."""

import json
import os
import resource
import signal
import socket
import tempfile
from typing import IO, Any

import xgrammar

from serve.grammar.json_schema import refuse_malformed
from serve.grammar.limits import (
    COMPILE_BYTES,
    COMPILE_CPU_SECONDS,
    MAX_COMPILED_BYTES,
    PROBE_CPU_SECONDS,
    PROBE_TOKENS,
)
from serve.grammar.matching import Matcher, pack_compiled
from serve.grammar.messages import receive, send
from serve.grammar.vocabulary import Vocabulary

_STACK_BYTES = 1 << 22
"""Half of what the matchers have, so what overflows there does it here."""
_WARNINGS = ("not supported", "not yet supported", "ignoring", "still ongoing", "uri should",
             "cannot be represented")  # fmt: skip
"""Parts of the library's warnings about schemas that it does not enforce."""


def compile_one(connection: socket.socket, vocabulary: Vocabulary) -> None:
    """Answer one message, `[kind, text]`, with the compiled grammar or an error."""
    (kind, text), _ = receive(connection)
    limit_memory(COMPILE_BYTES)
    resource.setrlimit(resource.RLIMIT_STACK, (_STACK_BYTES, _STACK_BYTES))
    os.nice(5)  # the engine computes at the same time
    signal.setitimer(signal.ITIMER_PROF, COMPILE_CPU_SECONDS)
    compiled = b""
    try:
        compiled = compile_grammar(vocabulary, kind, text)
        content = {}
    except BaseException as error:
        content = {"error": _one_line(error)}
    send(connection, content, compiled)


def limit_memory(n_bytes: int) -> None:
    """Limit what this process may allocate from now on; no core dumps."""
    used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + n_bytes, used + n_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def compile_grammar(vocabulary: Vocabulary, kind: str, text: str) -> bytes:
    """White space between the elements of JSON is fixed: a model cannot wander in it."""
    compiler = xgrammar.GrammarCompiler(vocabulary.info, max_threads=1, cache_enabled=False)
    with tempfile.TemporaryFile() as warnings:
        # the library appends; what is read here has a position of its own
        with open(f"/proc/self/fd/{warnings.fileno()}", "ab", 0) as appended:
            os.dup2(appended.fileno(), 2)
        special: set[int] = set()
        if kind == "json_schema":
            grammar = compiler.compile_json_schema(text, any_whitespace=False)
        elif kind == "regex":
            grammar = compiler.compile_regex(text)
        elif kind == "ebnf":
            grammar = compiler.compile_grammar(text)
        else:
            tag = _Tag(warnings)
            grammar = compiler.compile_structural_tag(json.dumps(tag.fixed(json.loads(text))))
            special = tag.tokens
        _refuse_warnings(warnings)
    signal.setitimer(signal.ITIMER_PROF, PROBE_CPU_SECONDS)
    _probe(Matcher(grammar, vocabulary, kind == "json_schema", special))
    compiled = grammar.serialize_json().encode()
    if len(compiled) > MAX_COMPILED_BYTES:
        raise ValueError(f"it needs more than {MAX_COMPILED_BYTES} bytes when it is compiled")
    return pack_compiled(bytes(compiled), special)


def _refuse_warnings(file: IO[bytes]) -> None:
    """Raise ValueError for a schema that the library does not enforce, which it reports on
    stderr. Each warning is found once."""
    for line in file.read().decode(errors="replace").splitlines():
        if any(part in line.lower() for part in _WARNINGS):
            raise ValueError(line)


class _Tag:
    """Prepares a structural tag for the library. warnings: what it writes on stderr."""

    def __init__(self, warnings: IO[bytes]) -> None:
        self.warnings = warnings
        self.tokens: set[int] = set()
        """Tokens that the tag names: special ones among them are allowed."""

    def fixed(self, value: Any) -> Any:
        """The tag whose JSON has fixed white space, by the grammars of its schemas."""
        if isinstance(value, list):
            return [self.fixed(one) for one in value]
        if not isinstance(value, dict):
            return value
        if value.get("type") == "json_schema" and value.get("style", "json") == "json":
            return {"type": "grammar", "grammar": self._grammar(value)}
        if type(value.get("token")) is int:
            self.tokens.add(value["token"])
        followed = ("format", "elements", "tags", "content", "begin", "end")
        return {key: self.fixed(one) if key in followed else one for key, one in value.items()}

    def _grammar(self, value: dict[str, Any]) -> str:
        given = value["json_schema"]
        if "unsupported" in value:
            refuse_malformed(value["unsupported"])
        try:
            return self._of_schema(given)
        except (RuntimeError, ValueError):
            if "otherwise" not in value:
                raise
            refuse_malformed(given)
            return self._of_schema(value["otherwise"])

    def _of_schema(self, schema: Any) -> str:
        grammar = xgrammar.Grammar.from_json_schema(json.dumps(schema), any_whitespace=False)
        _refuse_warnings(self.warnings)
        return str(grammar)


def _probe(matcher: Matcher) -> None:
    """Use the grammar a little. Text that is forced without end (recursion without a base case)
    exceeds the limits here, and so does an ambiguity that grows with each token."""
    for n in range(PROBE_TOKENS):
        _, finished = matcher.advance([])
        if finished:
            return
        words = matcher.mask[0].nonzero()[0].tolist()
        if not words:
            raise ValueError("no text of this tokenizer matches it")
        word = words[n * 7 % len(words)]
        bits = int(matcher.mask[0, word]) & 0xFFFFFFFF
        token = word * 32 + (bits & -bits).bit_length() - 1
        if token in matcher.matcher.stop_token_ids:
            return
        matcher.matcher.accept_token(token)


def _one_line(error: BaseException) -> str:
    """The library's message without its place in C++."""
    if isinstance(error, MemoryError) or "bad_alloc" in str(error):
        return "it needs too much memory"
    text = " ".join(str(error).split())
    if text.startswith("[") and ": " in text:
        text = text.split(": ", 1)[1]
    return text[:300] or type(error).__name__

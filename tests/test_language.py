"""Docstrings, comments and pages use the words of the field, in American spelling.

Names in backticks, code blocks and strings that are not docstrings are not checked; neither is
the history in CHANGELOG.md and docs/log.md.
"""

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("configs", "kernels", "models", "parallel", "train", "serve", "launch", "scripts")
PAGES = ("README.md", "CONTRIBUTING.md", "AGENTS.md", "docs/*.md")
HISTORY = "docs/log.md"
PLAIN = {
    r"nobody|whoever": "name the rank, process or person",
    r"somebody|everybody": "name the rank, process or person",
    r"stand-?ins?|stands? in for|stands? beside": "replacement, replaces",
    r"stands? for": "represents, means, is",
    r"stands|stood": "is, idles",
    r"lies(?! between)|lie(?! between)": "is, is stored",
    r"weighs?": "compares, multiplies by its weight",
    r"hands? (?:on|over|back|out)|handed": "passes, returns",
    r"speaks?(?: for| of)?": "prints, names, represents",
    r"parcels?": "message, chunk",
    r"(?<!on the )wires?": "format of the rows that are sent",
    r"tells?|told": "reports, specifies, prints",
    r"says|said|saying": "states, reports, sets, prints",
    r"knowing": "with",
    r"in the open": "visible, not hidden",
    r"on account of|an account of|accounts? of": "because of, statistics",
    r"rehears\w*": "dry run",
    r"shadows?": "copy, master weight",
    r"ledgers?": "table, log",
    r"besides?": "next to, in addition to",
    r"what is due|of one's own|without a word": "name it; own; silently",
    r"lives|lived": "is stored in",
    r"wants?": "requires, expects",
    r"sees|saw|seen": "reads, attends to, receives",
    r"learns of": "reads, is notified of",
    r"goes": "is copied, is written, runs",
    r"takes? part": "is included",
    r"mend(?:s|ed)?": "fix",
    r"asks|asked|asking": "requires, requests, calls",
    r"brings|brought": "provides, sends (not of code or hardware)",
    r"forgets?|remembers": "discards, stores",
    r"makes of|made of it": "computes from",
    r"yardstick": "baseline",
    r"cables?": "link",
    r"seams?": "interface",
    r"trusts?": "does not check",
    r"promis\w*": "guarantees",
    r"swallow\w*": "loses",
    r"fate|verdict|soul|oath|affair": "name the thing",
    r"(?:de|un)?quantis\w*": "quantize",
    r"(?:de|un)?normalis\w*": "normalize",
    r"(?:de)?tokenis\w*": "tokenize",
    r"(?:re|un)?initialis\w*": "initialize",
    r"neighbour\w*": "neighbor",
    r"(?:material|util|special|recogn|optim|synchron|serial|organ)is(?:e|es|ed|ing|ation)": "-ize",
    r"colou?rs?(?<!color)(?<!colors)|licence|behaviours?|centre|grey": "color, license, behavior",
}
"""Private or unclear words, and what to write instead."""
PRIVATE = re.compile(rf"\b(?:{'|'.join(PLAIN)})\b")
"""Of lower-case text, which is faster than ignoring case; without groups, so that most alternatives
are excluded by their first letter."""
QUOTED = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def tracked(*patterns: str) -> list[str]:
    done = subprocess.run(
        ["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [name for name in done.stdout.split("\0") if name]


def private_words(text: str, first_line: int = 1) -> Iterator[tuple[int, str, str]]:
    """(line, word, plain term) of every private word outside of backticks."""
    text = QUOTED.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text.lower())
    for match in PRIVATE.finditer(text):
        line = first_line + text.count("\n", 0, match.start())
        plain = next(plain for words, plain in PLAIN.items() if re.fullmatch(words, match[0]))
        yield line, match[0], plain


def texts_of(source: str) -> Iterator[tuple[int, str]]:
    """First line and text of every comment, docstring and string below a field or constant."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield node.lineno, text


def found_in_code(source: str) -> list[tuple[int, str, str]]:
    if not PRIVATE.search(source.lower()):  # parsing takes time
        return []
    return sorted(hit for line, text in texts_of(source) for hit in private_words(text, line))


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout: nothing is tracked")
def test_docstrings_comments_and_pages_use_plain_words() -> None:
    found = {}
    for name in tracked(*(f"{folder}/*.py" for folder in FOLDERS)):
        found[name] = found_in_code((ROOT / name).read_text())
    for name in tracked(*PAGES):
        if name != HISTORY:
            found[name] = [*private_words((ROOT / name).read_text())]
    lines = [
        f"{name}:{line}: {word} -> {plain}"
        for name, hits in found.items()
        for line, word, plain in hits
    ]
    assert not lines, "\n".join(lines)


def test_private_words_are_found_where_they_are() -> None:
    source = '''"""Fine."""
X = "it says so"  # whoever reads
def f() -> None:
    """First.

    `what it says` is quoted, but Quantised and beside are not.
    """
'''
    assert [(line, word) for line, word, _ in found_in_code(source)] == [
        (2, "whoever"),
        (6, "beside"),
        (6, "quantised"),
    ]
    assert [hit[:2] for hit in private_words("a\n```\ntold\n```\nnobody")] == [(5, "nobody")]

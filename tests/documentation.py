"""The shell commands in the README and the other pages, parsed from the text."""

import os
import re
import runpy
import shlex
import signal
import sys
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from unittest import mock

from tests.runs import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "AGENTS.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
_PROGRAM = re.compile(r"(?:\$ )?(python -m |torchrun |make\b)")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SHELLS = {"", "bash", "sh", "console"}
_INDENTED = re.compile(r"^    (?:\$ )?((?:python -m|torchrun|make) .*)$", re.MULTILINE)
_INLINE = re.compile(r"`((?:python -m|torchrun|make) [^`]+)`")


@dataclass(frozen=True)
class Command:
    """One documented command, split into words as by a shell."""

    page: str
    text: str
    """The command as printed, without prompt, comment and line breaks."""

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"

    @property
    def words(self) -> list[str]:
        """The words, with optional parts in brackets removed and placeholders filled in."""
        text = re.sub(r" \[-[^\]]*\]", "", self.text)  # [--ranks N] is optional
        text = text.split(" > ")[0]
        return [_PLACEHOLDERS.get(word, word) for word in _words(text)]


_PLACEHOLDERS = {
    "FILE": "configs/demo.toml",
    "FILE.toml": "configs/demo.toml",
    "EXPORT": "runs/demo/export",
    "N": "2",
}


def documented_commands() -> list[Command]:
    """Every command, page by page in reading order; a repeated command of a page appears once."""
    commands: dict[Command, None] = {}
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        if name == "docs/log.md":  # a record of past runs, not instructions
            continue
        for text in _texts(page.read_text()):
            for part in text.split(" && "):
                if _PROGRAM.match(part):
                    commands[Command(name, part.removeprefix("$ ").strip())] = None
    return list(commands)


def _texts(page: str) -> list[str]:
    """Candidate commands of a page: lines of fenced and indented blocks, and inline code."""
    found: list[tuple[int, str]] = []
    for block in _FENCE.finditer(page):
        if block[1] not in _SHELLS:
            continue
        joined = re.sub(r"\s*\\\n\s*", " ", block[2])
        for i, line in enumerate(joined.splitlines()):
            found.append((block.start() + i, re.sub(r"\s+# .*", "", line).strip()))
    outside = _FENCE.sub(lambda block: " " * len(block[0]), page)
    found += [
        (line.start(), re.sub(r"\s+# .*", "", line[1])) for line in _INDENTED.finditer(outside)
    ]
    found += [(code.start(), " ".join(code[1].split())) for code in _INLINE.finditer(outside)]
    return [text for _, text in sorted(found)]


def run_module(module: str, *arguments: str) -> tuple[int, str]:
    """Run `python -m MODULE ARGUMENTS` within this process; returns its exit code and its stderr.

    For commands with one rank; a new Python process that imports torch would take seconds each
    time.
    """
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers = {number: signal.getsignal(number) for number in stops}
    errors, code = StringIO(), 0
    # with this setting `restart_without_thread_cache` does nothing
    tunables = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
    try:
        with (
            mock.patch.object(sys, "argv", [module, *arguments]),
            mock.patch.dict(os.environ, tunables),
            redirect_stderr(errors),
        ):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code, errors.getvalue()


def _words(text: str) -> list[str]:
    """Split as a shell does, or at spaces if quotes are unbalanced."""
    try:
        return shlex.split(text)
    except ValueError:
        return text.split()

"""The program of the process that renders a chat template; it imports nothing of this repository.

It reads one JSON value per line and writes one: first the template's source, then the variables of
each rendering. The result is `{"text": ...}` or `{"error": ...}`. In addition to Jinja2's sandbox,
in which a template can access only its variables, the kernel limits the memory of this process and
the processor time of one line, however the template uses them. Where time ends, the process ends.
The functions for templates are those of transformers.
"""

import json
import resource
import signal
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEXT = 1 << 23
"""Characters of a prompt."""
MAX_SECONDS = 2.0
MAX_BYTES = 1 << 29
"""Memory, in addition to what the process needs at its start."""
_MOST_MESSAGE = 600


def main() -> None:
    limit_memory()
    template: Template | None = None
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        try:
            given = json.loads(line)
            if template is None:
                template, answer = compiled(given), {"text": ""}
            else:
                answer = {"text": "".join(pieces(template, given))}
            written = json.dumps(answer)
        except MemoryError:
            written = json.dumps({"error": "it needs too much memory"})
        except Exception as error:  # a template can fail in any way
            message = " ".join(str(error).split())[:_MOST_MESSAGE]
            written = json.dumps({"error": message or type(error).__name__})
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(written + "\n")
        sys.stdout.flush()


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def compiled(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    environment.filters["tojson"] = _to_json
    return environment.from_string(source)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, which marks what is trained on."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        found: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return found


def pieces(template: Template, variables: dict[str, Any]) -> Iterator[str]:
    length = 0
    for piece in template.generate(variables):
        length += len(piece)
        if length > MAX_TEXT:
            raise TemplateError("it writes too much text")
        yield piece


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(value: object, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


if __name__ == "__main__":
    main()

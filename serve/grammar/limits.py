"""Limits of grammars, and the error of one beyond them."""

MAX_GRAMMAR_CHARS = 1 << 18
MAX_CHOICES_OF_TEXT = 1024
MAX_SCHEMA_DEPTH = 64
"""Schemas within schemas."""
COMPILE_CPU_SECONDS = 3
COMPILE_SECONDS = 60
"""Wall-clock time; more than the processor time, for a machine with other work."""
QUEUE_SECONDS = 20
"""Time after which a grammar whose compilation has not begun is given up."""
ANSWER_SECONDS = 40
"""Time after which a client gets 503, because many clients give up after a minute. The compilation
continues, and its result is cached for the next try."""
PROBE_TOKENS = 32
"""Tokens that a compiled grammar is tried with."""
PROBE_CPU_SECONDS = 0.5
COMPILE_BYTES = 1 << 30
"""Memory that a compilation may allocate."""
MAX_COMPILED_BYTES = 1 << 24
"""Of one compiled grammar, serialized."""
MAX_CACHED = 256
"""Compiled grammars that are cached."""
MAX_CACHED_BYTES = 1 << 28
"""Of all of them, serialized."""
MAX_COMPILING = 64
"""Grammars that wait for their compilation; more get 429."""
N_COMPILING = 3
"""Grammars compiled at the same time."""
MATCH_CPU_SECONDS = 0.5
"""Processor time that a request may use at once to match its tokens, and what it starts with."""
MATCH_CPU_PER_TOKEN = 0.02
"""What each token adds to that."""
MATCH_BYTES = 1 << 32
"""Memory that the matchers of all requests may allocate."""
MATCH_SECONDS = 30
"""Wall-clock time after which the process of the matchers is considered lost."""


class GrammarError(ValueError):
    """A grammar that cannot be used. The message is one line for the client; status: of HTTP."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status

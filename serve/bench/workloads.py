"""Workloads of clients: prompts as token ids, and the order of requests.

| name | requests |
|---|---|
| random | one turn each, all prompts different: 128 tokens in, 64 out |
| shared-prefix | 4 groups of 8 with 512 common tokens and 32 different ones, 16 out |
| multi-turn | 8 clients of 4 turns, each with all earlier turns and 32 more tokens, 32 out |
| long-among-short | random, and one prompt of 1024 tokens, 16 out, after a quarter of them |
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

Turn = tuple[list[int], int]
"""Tokens that are added to the conversation, and the number of tokens to generate."""


@dataclass(frozen=True)
class Workload:
    """Conversations that run concurrently, each as a sequence of turns."""

    name: str
    concurrency: int
    """Number of concurrent conversations."""
    conversations: list[list[Turn]]


def build(name: str, concurrency: int, vocab: int, seed: int) -> Workload:
    """The requests of a workload. Raises KeyError for an unknown name."""
    rng = random.Random(f"{name} {concurrency} {seed}")

    def draw(n: int) -> list[int]:
        return [rng.randrange(3, vocab) for _ in range(n)]

    return Workload(name, concurrency, _BUILDERS[name](draw, max(2 * concurrency, 8)))


def _random(draw: Callable[[int], list[int]], n: int) -> list[list[Turn]]:
    return [[(draw(128), 64)] for _ in range(n)]


def _shared_prefix(draw: Callable[[int], list[int]], n: int) -> list[list[Turn]]:
    prefixes = [draw(512) for _ in range(4)]
    return [[(prefix + draw(32), 16)] for _ in range(8) for prefix in prefixes]


def _multi_turn(draw: Callable[[int], list[int]], n: int) -> list[list[Turn]]:
    return [[(draw(128 if turn == 0 else 32), 32) for turn in range(4)] for _ in range(8)]


def _long_among_short(draw: Callable[[int], list[int]], n: int) -> list[list[Turn]]:
    conversations = _random(draw, n)
    conversations.insert(n // 4, [(draw(1024), 16)])
    return conversations


def longest(workload: Workload) -> int:
    """Tokens of the longest conversation."""
    return max(
        sum(len(added) + n_out for added, n_out in turns) for turns in workload.conversations
    )


_BUILDERS = {
    "random": _random,
    "shared-prefix": _shared_prefix,
    "multi-turn": _multi_turn,
    "long-among-short": _long_among_short,
}
NAMES = tuple(_BUILDERS)
MAX_LENGTH = 2048
"""More than the longest conversation."""

"""The points of `scripts.bench_growth`: sizes, and the arguments of the run for each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scripts.bench_train.peers import DEMO

TOKENS = 8192
"""Per step, of the axis `sequence`."""


@dataclass(frozen=True)
class Point:
    """A run of the trainer, on `ranks` of `threads` each."""

    size: int
    arguments: tuple[str, ...]
    ranks: int = 1
    threads: int = 1
    experiment: str = DEMO


def _axis(sizes: Sequence[int], arguments: Callable[[int], Sequence[str]]) -> list[Point]:
    return [Point(size, tuple(arguments(size))) for size in sizes]


def _sequence(length: int) -> list[str]:
    batch = TOKENS // length
    return [
        f"--data.seq_len={length}", f"--train.global_batch={batch}", f"--train.micro_batch={batch}"
    ]  # fmt: skip


AXES = {
    "experts": _axis((8, 32, 128), lambda n: [f"--model.moe.n_experts={n}"]),
    "top_k": _axis((1, 2, 4, 8), lambda k: [f"--model.moe.top_k={k}"]),
    "sequence": _axis((256, 1024, 4096, 8192), _sequence),
    "layers": _axis((2, 4, 8, 16), lambda n: [f"--model.n_layers={n}"]),
    "threads": [Point(n, (), threads=n) for n in (1, 2)],
    "ranks": [Point(n, (), ranks=n) for n in (1, 2)],
}

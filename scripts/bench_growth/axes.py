"""The points of `scripts.bench_growth`: sizes, and the arguments of the run for each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.loader import load
from models.counts import flops_per_token
from scripts.bench_train.peers import DEMO
from train.data.sources import stdlib_root

TOKENS = 8192
"""Per step, of the axes `sequence` and `short_documents`."""
SHORT_DOCUMENTS = Path("cache/short_documents.txt")
"""Source of the axis `short_documents`."""
_CHARACTERS = 2500
"""Of a short document: about 700 tokens."""
_DOCUMENTS = 4000


@dataclass(frozen=True)
class Point:
    """A run of the trainer, on `ranks` of `threads` each."""

    size: int
    arguments: tuple[str, ...]
    ranks: int = 1
    threads: int = 1
    experiment: str = DEMO

    def flops_per_token(self) -> float:
        """Of the model, as if every sequence were one document."""
        config = load(self.experiment, list(self.arguments))
        return flops_per_token(config.model, config.data.seq_len)


def write_short_documents() -> None:
    """Cut the first files of the standard library into documents of about 700 tokens."""
    documents = list[str]()
    for path in sorted(stdlib_root().rglob("*.py")):
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        documents += [text[at : at + _CHARACTERS] for at in range(0, len(text), _CHARACTERS)]
        if len(documents) >= _DOCUMENTS:
            break
    SHORT_DOCUMENTS.parent.mkdir(exist_ok=True)
    SHORT_DOCUMENTS.write_text("\n<|endoftext|>\n".join(documents), "utf-8")


def _axis(sizes: Sequence[int], arguments: Callable[[int], Sequence[str]]) -> list[Point]:
    return [Point(size, tuple(arguments(size))) for size in sizes]


def _sequence(length: int) -> list[str]:
    batch = max(1, TOKENS // length)
    return [
        f"--data.seq_len={length}", f"--train.global_batch={batch}", f"--train.micro_batch={batch}"
    ]  # fmt: skip


AXES = {
    "experts": _axis((8, 32, 128), lambda n: [f"--model.moe.n_experts={n}"]),
    "top_k": _axis(
        (1, 2, 4, 8), lambda k: [f"--model.moe.top_k={k}", "--model.moe.norm_top_k=false"]
    ),
    "sequence": _axis((256, 1024, 4096, 8192), _sequence),
    "short_documents": _axis(
        (1024, 8192, 32768), lambda n: [*_sequence(n), f"--data.source={SHORT_DOCUMENTS}"]
    ),
    "layers": _axis((2, 4, 8, 16), lambda n: [f"--model.n_layers={n}"]),
    "threads": [Point(n, (), threads=n) for n in (1, 2)],
    "ranks": [Point(n, (), ranks=n) for n in (1, 2)],
}

"""What every check gets, and what it returns."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from scripts.bench_serve.servers import Load, Server, start

MODEL = "bench"
"""What our servers call the model."""


@dataclass(frozen=True)
class Row:
    """One result. ok: whether it is what it has to be."""

    check: str
    result: str
    ok: bool


@dataclass(frozen=True)
class Setting:
    """export: a folder in the format of Hugging Face, with a tokenizer and a chat template.

    python: the client's interpreter. folder: empty, for files.
    """

    export: Path
    python: Path
    folder: Path
    threads: int
    max_length: int

    @contextmanager
    def server(self, name: str, *options: str) -> Iterator[Server]:
        """Our server, while the context lasts. options: of `python -m serve`."""
        folder = self.folder / name
        folder.mkdir()
        load = Load(self.threads, max_running=16, max_length=self.max_length)
        server = start("ours", self.export, load, folder, *options)
        try:
            yield server
        finally:
            server.stop()


def root(server: Server) -> str:
    """Its address without the path."""
    return server.url.removesuffix("/v1")

"""A model whose logits are a hash of the tokens in the cache.

It writes every token and its position to its slot and reads the slots that a row may attend to. A
page that was evicted too early, freed twice, not yet written, or that belongs to another prefix
changes the hash or fails an assertion immediately. A step takes a fraction of a millisecond.
"""

import functools
import itertools
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.model import AttentionConfig, ModelConfig, MoEConfig
from models.decoder import Decoder
from serve.engine.batch import ForwardBatch
from serve.engine.core import EngineCore, EngineOptions
from serve.engine.loading import Export

VOCAB = 48
MAX_LENGTH = 256


def make_export(window: int = 0) -> Export:
    local = {"local": "window", "local_size": window, "full_every": 9} if window else {}
    config = ModelConfig(
        vocab_size=VOCAB,
        d_model=8,
        n_layers=1,
        attention=AttentionConfig(n_heads=1, n_kv_heads=1, head_dim=2, **local),  # type: ignore[arg-type]
        moe=MoEConfig(n_experts=2, top_k=1, d_expert=8),
    )
    return Export(
        name="hash",
        model=Decoder(config),
        tokenizer=None,
        end_tokens=frozenset([0]),
        max_length=MAX_LENGTH,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def make_core(window: int = 0, **options: object) -> EngineCore:
    core = EngineCore(make_export(window), EngineOptions(**options))  # type: ignore[arg-type]
    core.executor.runner = HashRunner(
        core.cache.capacity + core.cache.page_size, core.cache.page_size, window
    )  # type: ignore[assignment]
    return core


def logits_of(tokens: Sequence[int] | NDArray[np.int64], window: int = 0) -> Tensor:
    """Logits `[V]` after `tokens`."""
    seen = np.asarray(tokens, dtype=np.int64)[-window if window else 0 :]
    return _drawn(zlib.crc32(seen.tobytes()) + len(tokens))


@functools.lru_cache(1 << 16)
def _drawn(seed: int) -> Tensor:
    """A test computes most of its rows twice: in its schedule and alone."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal(VOCAB).astype(np.float32) * 2)


class HashRunner:
    """Replacement for `ModelRunner`."""

    def __init__(self, n_slots: int, page_size: int, window: int) -> None:
        self.tokens = np.full(n_slots, -1)
        self.positions = np.full(n_slots, -1)
        self.written = np.full(n_slots, -1)
        """The step and request that last wrote a slot, as step * 1000 + request."""
        self.page_size = page_size
        self.window = window
        self.n_steps = 0
        self.n_rows = 0

    def run(
        self,
        batch: ForwardBatch,
        score: Callable[[int, Tensor], None] | None = None,
        routing: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        assert routing is None
        self.n_steps += 1
        self.n_rows += len(batch.tokens)
        starts, ends = batch.query_starts.tolist(), batch.key_lengths.tolist()
        tables = batch.page_tables.numpy().astype(np.int64)
        n_rows = [end - start for start, end in itertools.pairwise(starts)]
        assert n_rows == sorted(n_rows, key=lambda n: n > 1), "decodes come first"
        slots = (tables[:, :, None] * self.page_size + np.arange(self.page_size)).reshape(
            len(ends), -1
        )
        for b, end in enumerate(ends):
            own = slots[b, end - n_rows[b] : end]
            assert own.min() >= self.page_size, "written to the null page"
            rows = slice(starts[b], starts[b + 1])
            assert (self.written[own] // 1000 < self.n_steps).all(), "written twice in a step"
            self.tokens[own] = batch.tokens[rows]
            self.positions[own] = batch.positions[rows]
            self.written[own] = self.n_steps * 1000 + b
        found = torch.stack(
            [self._row(batch, slots, row) for row in batch.rows.tolist()]
            or [torch.zeros(0, VOCAB)[:0].sum(0)]
        )[: len(batch.rows)]
        for q, row in enumerate(batch.scored_rows.tolist()):
            assert score is not None
            score(q, self._row(batch, slots, row)[None].clone())
        return found

    def _row(self, batch: ForwardBatch, slots: NDArray[np.int64], row: int) -> Tensor:
        b = int(torch.searchsorted(batch.query_starts, row, right=True)) - 1
        length = int(batch.positions[row]) + 1
        begin = max(0, length - self.window) if self.window else 0
        seen = slots[b, begin:length]
        assert (self.positions[seen] == np.arange(begin, length)).all(), (
            "a slot of another position"
        )
        fresh = self.written[seen] // 1000 == self.n_steps
        assert (self.written[seen][fresh] % 1000 == b).all(), "reads what this step only writes"
        padded = np.zeros(length, dtype=np.int64)
        padded[begin:] = self.tokens[seen]
        return logits_of(padded, self.window)

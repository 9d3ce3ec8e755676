"""Decode steps as CUDA graphs, one for each of a few batch sizes.

A decode of a few requests takes the GPU less time than Python needs to launch its kernels. A graph
launches all of them at once, but on the memory with which it was captured. So the inputs of a step
are copied into static buffers, and the batch is padded to the next captured size with requests
without keys, whose results are zero and whose slots are negative: nothing of them is written.
The last token is repeated there, so that padding uses no experts but those of that token.

Only CUDA has graphs. On a CPU the same buffers are computed directly, which the tests use.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels import device
from kernels.paged_attention.batch import PagedBatch
from serve.cuda.attention import DeviceBatch, send
from serve.engine.batch import ForwardBatch

Hidden = tuple[Tensor, Tensor]
"""Final hidden states of every row, and the head's weight."""


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    result: Hidden


@dataclass
class DecodeGraphs:
    """Computes steps with one token per request, by `forward` on static buffers."""

    forward: Callable[[DeviceBatch], Hidden]
    sizes: Sequence[int]
    """Numbers of requests, ascending."""
    page_size: int
    static: DeviceBatch
    """Buffers for the largest size."""
    captured: dict[int, _Captured] = field(default_factory=dict)

    @staticmethod
    def create(
        forward: Callable[[DeviceBatch], Hidden],
        max_running: int,
        page_size: int,
        max_pages: int,
        place: torch.device,
    ) -> "DecodeGraphs":
        """Allocate the buffers and, on CUDA, capture the graphs.

        Args:
            forward: The forward pass on a batch; on CUDA it must not wait for the device.
            max_running: Largest number of requests.
            page_size: Tokens per page.
            max_pages: Largest number of pages of a request.
            place: The device of the cache.
        """
        sizes = batch_sizes(max_running)
        integers = torch.zeros(3, max_running, dtype=torch.int64, device=place)
        static = DeviceBatch(
            tokens=integers[0],
            positions=integers[1],
            slots=integers[2].fill_(-1),
            requests=PagedBatch(
                torch.zeros(max_running, max_pages, dtype=torch.int32, device=place),
                torch.arange(max_running + 1, dtype=torch.int32, device=place),
                torch.zeros(max_running, dtype=torch.int32, device=place),
                max_running,
            ),
        )
        graphs = DecodeGraphs(forward, sizes, page_size, static)
        if place.type == "cuda":
            graphs.capture()
        return graphs

    def capture(self) -> None:
        """Capture every size, the largest first: the others then need no further memory."""
        with device.launching_on(self.static.tokens):
            self._capture()

    def _capture(self) -> None:
        pool = None
        for size in reversed(self.sizes):
            batch = self._part(size)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.forward(batch)  # compiles kernels, which is impossible during a capture
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                result = self.forward(batch)
            pool = graph.pool()
            self.captured[size] = _Captured(graph, result)

    def fits(self, batch: ForwardBatch) -> bool:
        """Whether `run` can compute the batch."""
        return len(batch.tokens) == len(batch.key_lengths) <= self.sizes[-1]

    def run(self, batch: ForwardBatch) -> Hidden:
        """Hidden states of as many rows as the smallest size that fits; rows after those of the
        batch are padding. Valid until the next call."""
        n = len(batch.tokens)
        size = next(size for size in self.sizes if size >= n)
        part = self._part(size)
        _load(part.tokens, batch.tokens, batch.tokens[-1])
        _load(part.positions, batch.positions, 0)
        _load(part.slots, batch.slots(self.page_size), -1)
        _load(part.requests.key_lengths, batch.key_lengths, 0)
        tables = batch.page_tables
        # entries after these are from earlier steps, and are not read
        part.requests.page_tables[:n, : tables.shape[1]] = send(tables, part.tokens.device)
        captured = self.captured.get(size)
        if captured is None:
            return self.forward(part)
        with device.launching_on(part.tokens):
            captured.graph.replay()
        return captured.result

    def _part(self, size: int) -> DeviceBatch:
        """The first `size` requests of the buffers."""
        static = self.static
        tables, starts, lengths, _ = static.requests
        requests = PagedBatch(tables[:size], starts[: size + 1], lengths[:size], size)
        tokens, positions, slots = (
            each[:size] for each in (static.tokens, static.positions, static.slots)
        )
        return DeviceBatch(tokens, positions, slots, requests)


def batch_sizes(max_running: int) -> list[int]:
    """Powers of two up to 16, then multiples of 16, and `max_running`."""
    powers = [size for size in (1, 2, 4, 8) if size < max_running]
    return [*powers, *range(16, max_running, 16), max_running]


def _load(buffer: Tensor, values: Tensor, padding: Tensor | int) -> None:
    n = len(values)
    buffer[:n] = send(values, buffer.device)
    buffer[n:] = padding

"""Computes the bytes of a step of all layers from the trace of a step of few layers.

A trace is a list of segments between marks: one for each layer's forward and for its backward, and
those between. A layer's segments are repeated for each layer that it represents. Memory that a
layer holds after its segments (gradients, reduced values that FSDP2 holds to the end of backward)
is freed after the backward of the first, or, by the next microbatch, before the forward of the
first: there, and before the step, a storage is multiplied by the number of layers that its layer
represents.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from parallel.memory.layers import Layers
from parallel.memory.tracker import Event, Mark, Segment

Bytes = Counter[str]
"""Bytes by category of memory, or by axis of the mesh and type of collective."""
FORWARD, BACKWARD, REFRESH = "forward", "backward", "refresh"
"""Marks of a layer: the beginning of its forward and of its backward, and the refresh of its
weights in FP8 after the update."""
STEP, HEAD, END = "step", "head", "end"
"""Marks outside layers: the beginning of a step, its head after the last layer, and the part after
the backward of the first."""


@dataclass(frozen=True)
class Needs:
    """Memory that a rank holds at the peak of a step, and bytes that it exchanges in the whole
    step."""

    peak: Bytes
    host: Bytes
    """In host memory, with `parallel.cpu_offload` on an accelerator."""
    exchanged: Bytes


def needs_of(
    held: Bytes,
    segments: Sequence[Segment],
    layers: Layers,
    passes: int,
    on_host: frozenset[str] = frozenset(),
    earlier: Sequence[tuple[Sequence[Segment], int]] = (),
) -> Needs:
    """Memory and communication of a step of all layers.

    held: before the last microbatch, by all layers. segments: of that microbatch and the rest of
    the step, traced with `layers`. passes: number of microbatches that communicate as it does.
    on_host: categories that are in host memory. earlier: traces of microbatches that communicate
    differently, and how many there are.
    """
    way = _way(segments, layers)
    exchanged: Bytes = Counter()
    for trace, times in [(way, passes), *((_way(one, layers), times) for one, times in earlier)]:
        for segment in trace:
            for kind, n_bytes in segment.exchanged.items():
                exchanged[kind] += n_bytes * (1 if segment.mark[0] == REFRESH else times)
    device = _peak(held, way, layers, lambda category: category not in on_host)
    return Needs(device, _peak(held, way, layers, on_host.__contains__), exchanged)


def _way(segments: Sequence[Segment], layers: Layers) -> list[Segment]:
    """The segments of all layers in order."""
    by_mark = {segment.mark: segment for segment in segments}
    assert len(by_mark) == len(segments), "a mark that came twice"
    return [by_mark[mark] for mark in _order(layers) if mark in by_mark]


def _order(layers: Layers) -> Iterator[Mark]:
    """The marks of a step of all layers in order."""
    n, place = layers.n_trunk, layers.place
    yield STEP, None
    yield from ((FORWARD, at) for at in place[:n])
    yield HEAD, None
    yield from ((FORWARD, at) for at in place[n:])
    yield from ((BACKWARD, at) for at in reversed(place))
    yield END, None
    yield from ((REFRESH, at) for at in place)


def _peak(
    held: Bytes, way: Sequence[Segment], layers: Layers, is_counted: Callable[[str], bool]
) -> Bytes:
    """Memory held at the peak, of the categories that are counted."""
    times = layers.times
    extents: dict[Mark, tuple[Bytes, Bytes]] = {}
    now: Bytes = Counter({kind: n_bytes for kind, n_bytes in held.items() if is_counted(kind)})
    total = most = now.total()
    peak = Counter(now)
    for segment in way:
        if segment.mark not in extents:
            events = [event for event in segment.events if is_counted(event.category)]
            if segment.mark[0] in (STEP, END):  # memory of layers, freed outside them
                events = [e._replace(n_bytes=e.n_bytes * _times(e, times)) for e in events]
            extents[segment.mark] = _extent(events)
        rise, net = extents[segment.mark]
        if total + rise.total() > most:
            most, peak = total + rise.total(), now + rise
        now.update(net)
        total += net.total()
    return +peak


def _times(event: Event, times: Counter[int]) -> int:
    return 1 if event.layer is None else times[event.layer]


def _extent(events: Sequence[Event]) -> tuple[Bytes, Bytes]:
    """The maximum held at any moment, and the amount at the end, relative to the beginning."""
    now, peak = Counter[str](), Counter[str]()
    total = most = 0
    for category, n_bytes, _ in events:
        now[category] += n_bytes
        total += n_bytes
        if total > most:
            most, peak = total, Counter(now)
    return peak, now


def extrapolate(low: Sequence[Segment], high: Sequence[Segment], factor: float) -> list[Segment]:
    """`low + factor * (high - low)`, for traces of the same step at two sizes."""

    def beyond(a: int, b: int) -> int:
        return a + round(factor * (b - a))

    found = []
    for one, other in zip(low, high, strict=True):
        assert one.mark == other.mark
        made = Segment(one.mark)
        for a, b in zip(one.events, other.events, strict=True):
            assert (a.category, a.layer) == (b.category, b.layer)
            made.events.append(a._replace(n_bytes=beyond(a.n_bytes, b.n_bytes)))
        for kind in {*one.exchanged, *other.exchanged}:
            made.exchanged[kind] = beyond(one.exchanged[kind], other.exchanged[kind])
        found.append(made)
    return found

"""What the inner loop of a product does, read from its machine code (sm_90, as nvdisasm prints it).

A *step* begins at the wait for the barrier of its operands, contains the tensor cores'
instructions (QGMMA) and the waits for them (WARPGROUP.DEPBAR), and ends before the next step's
barrier. Loops are cut there although the compiler may have placed the cut elsewhere. Parts that a
forward branch skips are executed once per tile and counted separately.
"""

import re
from dataclasses import dataclass
from itertools import pairwise

_LABEL = re.compile(r"^\s*(\.L_x_\w+):")
_LINE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?(\w+)\s+)?([A-Z]\w*(?:\.\w+)*)\s*([^;]*);")
_REGISTER = re.compile(r"\bR(\d+)\b")
_TARGET = re.compile(r"`\((\.L_x_\w+)\)")
_PRODUCT, _WAIT, _BARRIER = "QGMMA", "WARPGROUP.DEPBAR", "SYNCS.PHASECHK"


@dataclass(frozen=True)
class Instruction:
    """One line of machine code."""

    name: str
    """With its modifiers, for example `LDG.E.64`."""
    operands: str
    conditional: bool
    """Whether it has a predicate."""

    @property
    def writes(self) -> set[int]:
        """Registers of a load's result."""
        found = _REGISTER.match(self.operands)
        if not found:
            return set()
        width = {"64": 2, "128": 4}.get(self.name.rsplit(".", 1)[-1], 1)
        return set(range(int(found[1]), int(found[1]) + width))

    @property
    def reads(self) -> set[int]:
        """Registers after the first operand."""
        _, _, sources = self.operands.partition(",")
        return {int(number) for number in _REGISTER.findall(sources)}


@dataclass(frozen=True)
class Loop:
    """The inner loop of one group of warps; counts are per warp and step."""

    steps: int
    """Steps in the loop's body (more than one if the compiler unrolled it)."""
    instructions: float
    products: float
    """QGMMA instructions."""
    waits: float
    """Waits for the tensor cores."""
    promotion: float
    """Instructions between a wait for the tensor cores and the next product."""
    loads_before: int
    """Global loads between a barrier and its first QGMMA, in the whole body."""
    waited_loads: int
    """Global loads whose value is used before a product has been awaited: their latency shows."""
    scalings_before: int
    """FMUL of scales that precede a QGMMA although their values are used after it."""
    fused: float
    """FFMA instructions."""
    per_tile: int
    """Instructions of the surrounding loop over tiles, or of the program if there is none."""


def inner_loops(code: str) -> list[Loop]:
    """The innermost loops with products, in the order of the code: one per group of warps.

    Raises ValueError if there is none, or if one has no barrier.
    """
    body, labels = _parse(code)
    spans = sorted(
        (labels[target], i)
        for i, line in enumerate(body)
        for target in _TARGET.findall(line.operands)
        if line.name == "BRA"
        and labels[target] <= i
        # a block that waits for a barrier is behind the end of the program and jumps back
        and not any(_is(other, "EXIT") for other in body[labels[target] : i])
    )
    around = [
        [span for span in spans if span[0] <= i <= span[1]]
        for i, line in enumerate(body)
        if _is(line, _PRODUCT)
    ]
    inner = sorted({min(found, key=_length) for found in around if found})
    if not inner:
        raise ValueError("no loop with QGMMA in the machine code")
    return [_loop(body, labels, span, spans) for span in inner]


def _parse(code: str) -> tuple[list[Instruction], dict[str, int]]:
    body, labels = list[Instruction](), dict[str, int]()
    for line in code.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(body)
        elif found := _LINE.match(line):
            body.append(Instruction(found[2], found[3].strip(), found[1] is not None))
    return body, labels


def _is(line: Instruction, name: str) -> bool:
    return line.name.startswith(name)


def _inside(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]


def _length(span: tuple[int, int]) -> int:
    return span[1] - span[0]


def _loop(
    body: list[Instruction], labels: dict[str, int], span: tuple[int, int],
    loops: list[tuple[int, int]],
) -> Loop:  # fmt: skip
    always, once = _executed(body, labels, span)
    cyclic = _rotated(always)
    outer = [s for s in loops if _inside(span, s)]
    first, last = min(outer, key=_length) if outer else (0, len(body) - 1)
    if not once:
        once = last - first - _length(span)
    parts = _parts(cyclic)
    steps = len(parts)
    before = [part[: _first(part, _PRODUCT)] for part in parts]
    return Loop(
        steps=steps,
        instructions=len(cyclic) / steps,
        products=_count(cyclic, _PRODUCT) / steps,
        waits=_count(cyclic, _WAIT) / steps,
        promotion=_promotion(cyclic) / steps,
        loads_before=sum(_count(part, "LDG") for part in before),
        waited_loads=_waited_loads(cyclic),
        scalings_before=_scalings_before(cyclic),
        fused=_count(cyclic, "FFMA") / steps,
        per_tile=once,
    )


def _executed(
    body: list[Instruction], labels: dict[str, int], span: tuple[int, int]
) -> tuple[list[Instruction], int]:
    """Instructions of every pass of a loop, and the number of those that a branch can skip."""
    always, skipped, i = list[Instruction](), 0, span[0]
    while i <= span[1]:
        line = body[i]
        always.append(line)
        i += 1
        target = _TARGET.search(line.operands) if line.name == "BRA" else None
        if target and i < labels[target[1]] <= span[1]:
            part = body[i : labels[target[1]]]
            if not any(_is(x, _PRODUCT) for x in part):
                skipped += len(part)
                i = labels[target[1]]
    return always, skipped


def _rotated(body: list[Instruction]) -> list[Instruction]:
    """The loop from the last barrier before its first product on."""
    product = _first(body, _PRODUCT)
    barriers = [i for i, line in enumerate(body) if _is(line, _BARRIER)]
    if not barriers:
        raise ValueError("a loop with QGMMA waits for no barrier")
    cut = max((i for i in barriers if i < product), default=barriers[-1])
    return body[cut:] + body[:cut]


def _parts(cyclic: list[Instruction]) -> list[list[Instruction]]:
    """One part per step: those barriers that a product follows before the next barrier."""
    cuts = [i for i, line in enumerate(cyclic) if _is(line, _BARRIER)] + [len(cyclic)]
    parts = [cyclic[a:b] for a, b in pairwise(cuts)]
    return [part for part in parts if any(_is(line, _PRODUCT) for line in part)]


def _first(body: list[Instruction], name: str) -> int:
    return next(i for i, line in enumerate(body) if _is(line, name))


def _count(body: list[Instruction], name: str) -> int:
    return sum(_is(line, name) for line in body)


def _promotion(cyclic: list[Instruction]) -> int:
    """Instructions that run while this group's tensor cores have nothing to do."""
    idle, total = True, 0
    for line in cyclic:
        if _is(line, _PRODUCT):
            idle = False
        elif _is(line, _WAIT):
            idle = True
        total += idle
    return total


def _waited_loads(cyclic: list[Instruction]) -> int:
    waited, n = 0, len(cyclic)
    for i, line in enumerate(cyclic):
        if not _is(line, "LDG"):
            continue
        covered = False
        for j in range(i + 1, i + n):
            other = cyclic[j % n]
            if line.writes & other.reads:
                waited += not covered
                break
            covered = covered or _is(other, _WAIT)
    return waited


def _scalings_before(cyclic: list[Instruction]) -> int:
    """FMUL whose value is used only after a later product; others belong to the promotion."""
    total, pending = 0, list[set[int]]()
    for line in cyclic:
        if _is(line, _PRODUCT):
            total, pending = total + len(pending), []
        elif _is(line, "FMUL"):
            pending.append(line.writes)
        elif _is(line, "FFMA"):
            pending = [written for written in pending if not written & line.reads]
    return total
